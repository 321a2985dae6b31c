"""A tiny model of every model type: saved, whole in memory, and as a skeleton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_svd_distill.architecture.matrices import LayerMatrices, find_matrices
from moe_svd_distill.architecture.skeleton import Skeleton, build_skeleton
from moe_svd_distill.architecture.stored import CheckpointMap
from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint
from tests.support import architectures
from tests.support.passes import one_thread_and_a_journal_of_every_layer


@dataclass(frozen=True)
class Case:
    """A saved model; everything else is made when a test asks for it."""

    folder: Path
    text_only: bool = False

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    @cached_property
    def resident(self) -> Any:
        """The model as its users load it."""
        return architectures.load(self.folder)

    @cached_property
    def skeleton(self) -> Skeleton:
        """Filled with the checkpoint's weights, as far as they have a place."""
        skeleton = self.empty_skeleton()
        fill(skeleton, CheckpointMap(self.checkpoint, skeleton), self.checkpoint)
        return skeleton

    @cached_property
    def stored(self) -> CheckpointMap:
        return CheckpointMap(self.checkpoint, self.skeleton)

    @cached_property
    def matrices(self) -> LayerMatrices:
        return find_matrices(self.skeleton, self.stored)

    def empty_skeleton(self) -> Skeleton:
        return build_skeleton(self.checkpoint.config, "model", torch.float32, "cpu", text_only=self.text_only)


@torch.no_grad()
def fill(skeleton: Skeleton, stored: CheckpointMap, checkpoint: Checkpoint) -> None:
    """Read all parts as the map says."""
    for sources in stored.of_part.values():
        for source in sources:
            if not source.pieces:
                made = source.convert((checkpoint.read(name) for name in source.hub_names), stored.names)
                for slot in source.slots:
                    slot.fill(made[slot.name].to(slot.dtype))
                continue
            (slot,) = source.slots
            whole = torch.full(slot.shape, float("nan")).to(slot.dtype)
            for piece in source.pieces:
                piece.within(whole).copy_(checkpoint.read(piece.hub_name))
            slot.fill(whole)


@pytest.fixture(autouse=True, scope="package")
def _passes() -> Iterator[None]:
    with one_thread_and_a_journal_of_every_layer():
        yield


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The model of a type, built once."""

    @cache
    def make(model_type: str) -> Case:
        return Case(architectures.saved(model_type, tmp_path_factory.mktemp("model") / "model"))

    return make


@pytest.fixture(params=architectures.every_type())
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Case:
    """One type after the other."""
    return make_case(request.param)
