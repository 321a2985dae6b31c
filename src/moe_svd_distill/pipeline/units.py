"""The weights stage's units of work: paired from two models, each with the key of all it depends on, and done.

Every worker process imports this file, so torch comes with the first unit.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from moe_svd_distill.execution.parts import PartContent
from moe_svd_distill.execution.worker import report_progress
from moe_svd_distill.pairing.plan import Pairing, pair_models
from moe_svd_distill.pairing.unit import UnitOfWork, with_key
from moe_svd_distill.pipeline.sampling import embedding_similarity
from moe_svd_distill.transfer.settings import ALGORITHM_VERSION, TransferSettings, transfer_settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moe_svd_distill.checkpoints import Checkpoint
    from moe_svd_distill.execution.supervisor import ExecutionSettings, Work
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.recipe import Recipe
    from moe_svd_distill.roles import Geometry


NUMERIC_LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "safetensors")
PROJECT = "moe-svd-distill"


def prepare(recipe: Recipe, pair: ModelPair, execution: ExecutionSettings) -> Pairing:
    """Pair the models and give every unit the key of all it depends on.

    Raises:
        IncompatiblePairError: Nothing of the student can be made from the teacher.
        UsageError: The recipe does not fit the models.
    """
    plan = plan_pair(recipe, pair)
    context = identity(recipe, pair, execution)
    return replace(plan, units=tuple(with_key(unit, context) for unit in plan.units))


def plan_pair(recipe: Recipe, pair: ModelPair) -> Pairing:
    """The plan of ``pair_models`` with what it needs to know of the embeddings.

    Raises:
        IncompatiblePairError: Nothing of the student can be made from the teacher.
        UsageError: The recipe does not fit the models.
    """
    return pair_models(
        pair.teacher.layout,
        pair.student.layout,
        recipe,
        embedding_similarity=embedding_similarity(pair),
        reason_against=pair.student.keys.reason_against,
    )


def identity(recipe: Recipe, pair: ModelPair, execution: ExecutionSettings) -> dict[str, object]:
    """All that decides the bytes of a part besides its unit. The number of workers is not among it."""
    kinds = sorted({_device_kind(device) for device in execution.devices})
    return {
        "algorithm": ALGORITHM_VERSION,
        "versions": library_versions(),
        "devices": kinds,
        "threads": execution.threads_per_worker,
        "settings": asdict(transfer_settings(recipe)),
        "teacher": pair.teacher.checkpoint.cache_key(),
        "student": pair.student.checkpoint.cache_key(),
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic decides the result."""
    return {name: version(name) for name in NUMERIC_LIBRARIES}


def digest_of(*numbers: NDArray[np.int64]) -> str:
    """The sha256 of tokens or positions, for the identity of what is computed from them."""
    return hashlib.sha256(b"".join(part.tobytes() for part in numbers)).hexdigest()


def make_work(recipe: Recipe, pair: ModelPair) -> Work:
    """What computes the units of ``prepare``; the models reopen themselves in the process it is sent to."""
    geometries = (pair.teacher.layout.geometry, pair.student.layout.geometry)
    models = (pair.teacher.checkpoint, pair.student.checkpoint)
    return partial(_computed, models, geometries, transfer_settings(recipe))


def _computed(
    models: tuple[Checkpoint, Checkpoint],
    geometries: tuple[Geometry, Geometry],
    settings: TransferSettings,
    unit: UnitOfWork,
    device: str,
) -> PartContent:
    from moe_svd_distill.transfer.unit import transfer_unit

    for checkpoint, views in zip(models, unit.views(), strict=True):
        checkpoint.prefetch({view.stored for view in views})
    return transfer_unit(unit, models, geometries, settings, device, report_progress)


def _device_kind(device: str) -> str:
    import torch

    from moe_svd_distill.algebra.dtypes import matmul_dtype

    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)} {torch.version.cuda}"
    return f"cpu {torch.backends.cpu.get_cpu_capability()} {matmul_dtype(torch.device('cpu'))}"
