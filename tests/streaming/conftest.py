"""Tiny models of every family with a random adapter each, and what transformers and PEFT make of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint
from tests.support import tiny
from tests.support.passes import one_thread_and_a_journal_of_every_layer

logging.set_verbosity_error()
logging.disable_progress_bar()

LENGTH = 12


@dataclass(frozen=True)
class Case:
    """A saved model and an adapter with a pair for every tensor that can have one."""

    name: str
    folder: Path
    adapter: Path

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)


@pytest.fixture(autouse=True, scope="package")
def _passes() -> Iterator[None]:
    with one_thread_and_a_journal_of_every_layer():
        yield


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @cache
    def make(name: str) -> Case:
        folder = tmp_path_factory.mktemp(name)
        student = tiny.save_student(folder / "student", name, shard="40KB")
        adapter = tiny.save_adapter(folder / "adapter", student, tiny.random_pairs(student))
        return Case(name, student, adapter)

    return make


@pytest.fixture(params=["glm4_moe", "llama", "mixtral", "qwen3", "qwen3_moe"])
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Case:
    """One family after the other."""
    return make_case(request.param)


@pytest.fixture
def sparse(make_case: Callable[[str], Case]) -> Case:
    """A family with dense layers, shared experts and routed experts."""
    return make_case("glm4_moe")


@pytest.fixture
def sequences() -> NDArray[np.int64]:
    """Five sequences: two batches of two and one of one."""
    ids = torch.randint(3, 64, (5, LENGTH), generator=torch.Generator().manual_seed(2))
    return ids.numpy()


def resident(folder: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model in memory as users load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    if adapter is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, str(adapter)).eval().get_base_model()


@torch.no_grad()
def outcome(model: Any, sequences: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states and logits of a whole model."""
    ids = torch.from_numpy(sequences)
    decoder = model.get_decoder()
    decoder = model.model if decoder is model else decoder  # Llama 4 names the wrong one
    states = decoder(input_ids=ids, use_cache=False).last_hidden_state
    return states, model(input_ids=ids, use_cache=False).logits
