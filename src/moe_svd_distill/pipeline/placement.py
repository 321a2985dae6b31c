"""Where a student is trained, and in how many processes: in memory or streamed, on which devices, in which type."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moe_svd_distill.algebra.dtypes import compute_dtype
from moe_svd_distill.errors import UsageError
from moe_svd_distill.evaluation.loading import available_bytes, model_bytes
from moe_svd_distill.execution.supervisor import ExecutionSettings
from moe_svd_distill.pipeline.trained_matrices import tokens_at_once, trained_numbers, trained_shapes
from moe_svd_distill.training.head import LOGIT_BYTES
from moe_svd_distill.training.settings import Placement

if TYPE_CHECKING:
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.pipeline.schedule import TrainingSchedule
    from moe_svd_distill.recipe import Recipe

_SHARE = 0.7  # of the free memory that a student in training may take
_TOKENS_OF_A_PROCESS = 512
_PER_NUMBER = 4 * 5  # that is trained: value, gradient, two moments, and the best so far, float32
_KEPT_FOR_THE_WAY_BACK = 2  # times what goes into and out of the matrices of the layers
_LOGITS_AT_ONCE = 5  # of both models, with what becomes of them
_FLOAT = 4
LIBRARIES_BYTES = 450 << 20  # of a process that has loaded torch and transformers


def free_here(recipe: Recipe) -> dict[str, int]:
    """What a run could use now, for JSON: memory of the device with the least, and the disk of the output."""
    folder = recipe.output.resolve()
    while not folder.exists():
        folder = folder.parent
    memory = min(map(available_bytes, execution_settings(recipe).devices))
    return {"memory_bytes": memory, "disk_bytes": shutil.disk_usage(folder).free}


def execution_settings(recipe: Recipe) -> ExecutionSettings:
    """Devices and number of workers.

    ``auto`` means every CUDA device, or the CPU. One worker serves a CUDA device; on the CPU there is one for each
    group of ``threads`` cores.

    Raises:
        UsageError: A CUDA device that is not there.
    """
    devices = devices_here(recipe.devices)
    if recipe.workers is not None:
        workers = recipe.workers
    elif devices == ("cpu",):
        workers = max(1, (available_cores() // recipe.threads))
    else:
        workers = len(devices)
    return ExecutionSettings(workers=workers, devices=devices, threads_per_worker=recipe.threads)


def devices_here(asked: Sequence[str]) -> tuple[str, ...]:
    """Devices by name; ``auto`` is every CUDA device, or the CPU.

    Raises:
        UsageError: A CUDA device that is not there, or a name of another form.
    """
    count = torch.cuda.device_count()
    if list(asked) == ["auto"]:
        return tuple(f"cuda:{number}" for number in range(count)) or ("cpu",)
    for device in asked:
        name, _, number = device.partition(":")
        if device not in ("cpu", "cuda") and not (name == "cuda" and number.isdigit()):
            raise UsageError(f"device {device!r} is not auto, cpu or cuda:N", "Correct --device")
        if name == "cuda" and int(number or 0) >= count:
            raise UsageError(f"device {device} is not there (found {count} CUDA devices)", "Choose another --device")
    return tuple(dict.fromkeys(asked))


def threads_of_a_run() -> int:
    """As many as the environment says, whatever the process was doing before: sums depend on their number."""
    return int(os.environ.get("OMP_NUM_THREADS") or 0) or available_cores()


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def place_training(
    recipe: Recipe, pair: ModelPair, settings: ExecutionSettings, schedule: TrainingSchedule
) -> Placement:
    """Decide where to train.

    Args:
        recipe: What is asked for.
        pair: Teacher and student.
        settings: Devices that may be used, and processes on the CPU.
        schedule: What moves, and how much text goes into a step; CPU processes with few tokens each wait for one
            another more than they gain.
    """
    devices, together, step_tokens = settings.devices, schedule.sequences, schedule.settings.step_tokens
    kind = torch.device(devices[0]).type
    dtype = training_dtype(recipe, pair, torch.device(devices[0]))
    cores = threads_of_a_run()
    name = str(dtype).removeprefix("torch.")
    needed = bytes_in_training(pair, dtype, schedule, min(step_tokens, tokens_at_once(recipe, devices[0])))
    free = min(available_bytes(device) for device in devices)
    asked = recipe.training.placement
    if asked == "streamed" or (asked == "auto" and needed > _SHARE * free):
        why = "asked for" if asked == "streamed" else f"it needs {_gib(needed)} in memory and {_gib(free)} are free"
        return Placement(False, devices[:together], cores, name, why, needed)
    if kind != "cpu":
        return Placement(True, devices[:together], cores, name, f"{_gib(needed)} on each device", needed)
    processes = max(
        1, min(settings.workers, together, step_tokens // _TOKENS_OF_A_PROCESS, int(_SHARE * free // max(1, needed)))
    )
    why = _gib(needed) if processes == 1 else f"{_gib(needed)} in each of {processes} processes"
    return Placement(True, ("cpu",) * processes, max(1, cores // processes), name, why, needed)


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


def bytes_in_training(pair: ModelPair, dtype: torch.dtype, schedule: TrainingSchedule, batch_tokens: int) -> int:
    """What a process takes in which a student is trained in memory.

    Args:
        pair: Teacher and student.
        dtype: Type that the student computes in.
        schedule: What moves.
        batch_tokens: Tokens that go through a layer together.
    """
    student, shapes = pair.student, trained_shapes(pair.student, schedule.ranks)
    geometry, folder = student.layout.geometry, student.checkpoint.folder
    entries, theirs = (of.layout.geometry.vocabulary * of.layout.geometry.hidden for of in (pair.student, pair.teacher))
    body = model_bytes(folder, dtype.itemsize) - entries * dtype.itemsize * (1 if student.architecture.tied else 2)
    body = int(body * schedule.share)
    # Where pairs act inside the weights there is a second copy of these, and a layer's gradients.
    inside = dtype.itemsize == _FLOAT or bool(geometry.experts)
    weights = body * 2 + body // geometry.layers if inside else body
    moving = trained_numbers(shapes, schedule.ranks) + (entries if schedule.head_moves else 0)
    heads = (_FLOAT + (_FLOAT if schedule.head_moves else 2)) * (entries + theirs)
    through = sum(sum(shape[-2:]) for shape in shapes.values()) // max(1, geometry.experts)
    activations = _KEPT_FOR_THE_WAY_BACK * batch_tokens * through * dtype.itemsize
    logits = _LOGITS_AT_ONCE * min(LOGIT_BYTES, _FLOAT * batch_tokens * geometry.vocabulary)
    return LIBRARIES_BYTES + weights + _PER_NUMBER * moving + heads + activations + logits


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
