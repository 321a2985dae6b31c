"""From a recipe and two models to units of work with their keys, and to how they are carried out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from moe_svd_distill.algebra.dtypes import matmul_dtype
from moe_svd_distill.errors import UsageError
from moe_svd_distill.execution.supervisor import Settings
from moe_svd_distill.pairing.plan import Plan, make_plan
from moe_svd_distill.pairing.unit import with_key
from moe_svd_distill.pipeline.pair import ModelPair
from moe_svd_distill.pipeline.relatedness import embedding_similarity
from moe_svd_distill.pipeline.work import DistillWork
from moe_svd_distill.recipe import Recipe
from moe_svd_distill.transfer.settings import ALGORITHM_VERSION, transfer_settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NUMERIC_LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "safetensors")
PROJECT = "moe-svd-distill"


def prepare(recipe: Recipe, pair: ModelPair, execution: Settings) -> Plan:
    """Pair the models and give every unit the key of all it depends on.

    Raises:
        IncompatiblePairError: Nothing of the student can be made from the teacher.
        UsageError: The recipe does not fit the models.
    """
    plan = plan_pair(recipe, pair)
    context = identity(recipe, pair, execution)
    return replace(plan, units=tuple(with_key(unit, context) for unit in plan.units))


def plan_pair(recipe: Recipe, pair: ModelPair) -> Plan:
    """The plan of ``make_plan`` with what it needs to know of the embeddings.

    Raises:
        IncompatiblePairError: Nothing of the student can be made from the teacher.
        UsageError: The recipe does not fit the models.
    """
    return make_plan(
        pair.teacher.layout,
        pair.student.layout,
        recipe,
        embedding_similarity=embedding_similarity(pair),
        reason_against=pair.student.keys.reason_against,
    )


def identity(recipe: Recipe, pair: ModelPair, execution: Settings) -> dict[str, Any]:
    """All that decides the bytes of a part besides its unit. The number of workers is not among it."""
    kinds = sorted({_device_kind(device) for device in execution.devices})
    return {
        "algorithm": ALGORITHM_VERSION,
        "versions": library_versions(),
        "devices": kinds,
        "threads": execution.threads_per_worker,
        "settings": asdict(transfer_settings(recipe)),
        "teacher": pair.teacher.checkpoint.fingerprint(),
        "student": pair.student.checkpoint.fingerprint(),
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic decides the result."""
    return {name: version(name) for name in NUMERIC_LIBRARIES}


def digest_of(*numbers: NDArray[np.int64]) -> str:
    """The sha256 of tokens or positions, for the identity of what is computed from them."""
    return hashlib.sha256(b"".join(part.tobytes() for part in numbers)).hexdigest()


def make_work(recipe: Recipe, pair: ModelPair) -> DistillWork:
    """The work for the units of ``prepare``."""
    return DistillWork(
        teacher=pair.teacher.checkpoint,
        student=pair.student.checkpoint,
        geometries=(pair.teacher.layout.geometry, pair.student.layout.geometry),
        settings=transfer_settings(recipe),
    )


def execution_settings(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> Settings:
    """Devices and number of workers.

    ``auto`` means every CUDA device, or the CPU. One worker serves a CUDA device; on the CPU there is one for each
    group of ``threads`` cores.

    Raises:
        UsageError: A CUDA device that is not there.
    """
    devices = _devices(recipe.devices)
    for device in devices:
        if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise UsageError(
                f"device {device} is not there (found {torch.cuda.device_count()} CUDA devices)",
                "Choose another --device",
            )
    if recipe.workers is not None:
        workers = recipe.workers
    elif devices == ("cpu",):
        workers = max(1, (available_cores() // recipe.threads))
    else:
        workers = len(devices)
    return Settings(workers=workers, devices=devices, threads_per_worker=recipe.threads)


def _devices(asked: list[str]) -> tuple[str, ...]:
    if asked == ["auto"]:
        found = tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))
        return found or ("cpu",)
    return tuple(dict.fromkeys(asked))


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _device_kind(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)} {torch.version.cuda}"
    return f"cpu {torch.backends.cpu.get_cpu_capability()} {matmul_dtype(torch.device('cpu'))}"
