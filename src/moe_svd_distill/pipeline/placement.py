"""Where a student is trained: in memory or streamed, in how many processes, and in which type."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_svd_distill.algebra.dtypes import compute_dtype
from moe_svd_distill.evaluation.loading import available_bytes, model_bytes
from moe_svd_distill.pipeline.preparation import available_cores
from moe_svd_distill.pipeline.ranks import trained_numbers, trained_shapes

if TYPE_CHECKING:
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.recipe import Recipe

_SHARE = 0.7  # of the free memory that a student in training may take
_TOKENS_OF_A_PROCESS = 512
_COPIES = 2  # the weights, and the weights with the pairs in them; of gradients there is a layer's at a time
_PER_FACTOR = 4 * 5  # value, gradient, two moments, and the best so far, float32


@dataclass(frozen=True)
class Placement:
    """Where a student is trained.

    Attributes:
        resident: Whether it is in memory, or one layer of it at a time.
        devices: One for each process.
        threads: CPU threads of each process.
        dtype: Type to compute in.
        reason: Why, in words.
    """

    resident: bool
    devices: tuple[str, ...]
    threads: int
    dtype: str
    reason: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)


def place_training(
    recipe: Recipe,
    pair: ModelPair,
    devices: tuple[str, ...],
    workers: int,
    ranks: Mapping[str, int],
    together: int,
    step_tokens: int,
) -> Placement:
    """Decide where to train.

    Args:
        recipe: What is asked for.
        pair: Teacher and student.
        devices: That may be used.
        workers: Processes that may be used on the CPU.
        ranks: Hub name to rank of every trained matrix.
        together: Sequences of one step, which the processes share.
        step_tokens: Tokens of one step; CPU processes with few tokens each wait for one another more than they gain.
    """
    kind = torch.device(devices[0]).type
    dtype = training_dtype(recipe, pair, torch.device(devices[0]))
    cores = int(os.environ.get("OMP_NUM_THREADS") or 0) or available_cores()
    name = str(dtype).removeprefix("torch.")
    needed = bytes_in_training(pair, dtype.itemsize, ranks)
    free = min(available_bytes(device) for device in devices)
    asked = recipe.training.placement
    if asked == "streamed" or (asked == "auto" and needed > _SHARE * free):
        why = "asked for" if asked == "streamed" else f"it needs {_gib(needed)} in memory and {_gib(free)} are free"
        return Placement(False, devices[:together], cores, name, why)
    if kind != "cpu":
        return Placement(True, devices[:together], cores, name, f"{_gib(needed)} on each device")
    processes = max(
        1, min(workers, together, step_tokens // _TOKENS_OF_A_PROCESS, int(_SHARE * free // max(1, needed)))
    )
    why = f"{_gib(needed)} in each of {processes} processes"
    return Placement(True, ("cpu",) * processes, max(1, cores // processes), name, why)


def training_dtype(recipe: Recipe, pair: ModelPair, device: torch.device) -> torch.dtype:
    """Type that the student computes in.

    On a CPU bfloat16 is for dense students alone: experts are trained inside their weights, where it swallows what is
    small.
    """
    if recipe.training.dtype != "auto":
        asked: torch.dtype = getattr(torch, recipe.training.dtype)
        return asked
    geometry = pair.student.layout.geometry
    return compute_dtype(device, 0 if geometry.experts else geometry.hidden)


def bytes_in_training(pair: ModelPair, itemsize: int, ranks: Mapping[str, int]) -> int:
    """What a student takes while it is trained in memory, its activations left out."""
    factors = trained_numbers(trained_shapes(pair.student, ranks), ranks)
    geometry = pair.student.layout.geometry
    head = geometry.vocabulary * geometry.hidden
    body = model_bytes(pair.student.checkpoint.folder, itemsize)
    return _COPIES * body + body // geometry.layers + _PER_FACTOR * (factors + head)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
