"""Students of several makes with an adapter each, built once per run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from tests.support import tiny

torch.set_num_threads(1)  # the matrices are tiny, and the machine may be shared
logging.set_verbosity_error()
logging.disable_progress_bar()


@dataclass(frozen=True)
class Case:
    """A student and a random adapter with a pair for every tensor that can have one."""

    name: str
    student: Path
    adapter: Path
    pairs: dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    cases: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in cases:
            folder = tmp_path_factory.mktemp(name)
            student = tiny.save_student(folder / "student", name)
            pairs = tiny.random_pairs(student)
            cases[name] = Case(name, student, tiny.save_adapter(folder / "adapter", student, pairs), pairs)
        return cases[name]

    return make


@pytest.fixture(params=sorted(tiny.MODELS))
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Case:
    """One make of student after the other."""
    return make_case(request.param)


@pytest.fixture
def dense(make_case: Callable[[str], Case]) -> Case:
    return make_case("llama")


@pytest.fixture
def sparse(make_case: Callable[[str], Case]) -> Case:
    """A student with dense layers, shared experts and routed experts."""
    return make_case("glm4_moe")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a changed adapter of a case, with the case's own configuration unless another is given."""

    def write_adapter(
        case: Case, pairs: dict[str, torch.Tensor], configuration: dict[str, object] | None = None
    ) -> Path:
        if configuration is None:
            configuration = json.loads((case.adapter / "adapter_config.json").read_text())
        return tiny.save_adapter(tmp_path / "changed", case.student, pairs, configuration)

    return write_adapter
