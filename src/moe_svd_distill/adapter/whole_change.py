"""What a head saved whole changes, and how much of that is the rounding of its stored dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.adapter.blocks import row_blocks
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.whole_head import base_head, change_norm, norm_of_blocks, student_of
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import MissingInputError, UsageError

if TYPE_CHECKING:
    import torch

SIGNIFICANT_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
_MUCH = 0.05
"""The share of the change from which its rounding is worth a warning: a twentieth shows in the logits."""


@dataclass(frozen=True)
class WholeChange:
    """What one tensor saved whole changes.

    Attributes:
        relative: ``‖W' - W‖ / ‖W‖``; None where the student's own tensor was not at hand to compare with.
        rounding: The expected norm of the rounding of W' to its stored dtype, as a share of ``‖W' - W‖``; None as
            above, or where nothing changes.
        note: What a reader should know, or nothing.
    """

    hub_name: str
    relative: float | None
    rounding: float | None
    note: str = ""


def changes_of_whole(
    pairs: LowRankPairs, student: Checkpoint | Path | str | None, configuration: Mapping[str, Any]
) -> tuple[WholeChange, ...]:
    """Compare every tensor that an adapter saves whole with the student's own.

    Args:
        pairs: The adapter.
        student: The student, its folder, or None for the base model that the configuration names, if it lies here.
        configuration: The content of adapter_config.json.

    Raises:
        BadDataError: The student's head has another shape, or is not stored as floating-point numbers.
    """
    return tuple(_change(pairs, name, student, configuration) for name in pairs.whole)


def rounding_norm(values: torch.Tensor, bits: int) -> float:
    """The expected norm of the error of rounding a matrix to so many significant bits, to nearest.

    The error of a value with the unit in the last place u is uniform in ±u/2: its mean square is u²/12.
    """
    import torch

    # The exponent bits of an fp32 value alone are the power of two below it; its unit is 2^(1 - bits) of that.
    powers = (
        (values[rows].float().view(torch.int32) & 0x7F800000).view(torch.float32) for rows in row_blocks(*values.shape)
    )
    return norm_of_blocks(powers) * 2.0 ** (1 - bits) / math.sqrt(12)


def _change(
    pairs: LowRankPairs, name: str, student: Checkpoint | Path | str | None, configuration: Mapping[str, Any]
) -> WholeChange:
    try:
        base = base_head(student_of(student, configuration, "a comparison"), pairs.whole[name])
    except (UsageError, MissingInputError):  # config.json may be all there is of the student
        note = f"{name} is saved whole; whether it differs from the student's was not checked, as that is not at hand"
        return WholeChange(name, None, None, note)
    new, dtype = pairs.read_whole(name), pairs.header.tensors[pairs.whole[name].key].dtype
    change, size = change_norm(new, base), norm_of_blocks(base[rows] for rows in row_blocks(*base.shape))
    if not change:
        return WholeChange(name, 0.0, None, f"{name} is saved whole and is the student's own: it changes nothing")
    rounding = rounding_norm(new, SIGNIFICANT_BITS[dtype]) / change
    note = ""
    if rounding > _MUCH:
        note = (
            f"{name} is saved whole in {dtype} and differs from the student's by {change / size:.2%} of its norm: "
            f"rounding alone makes about {rounding:.0%} of that; a LoRA pair would keep the change"
        )
    return WholeChange(name, change / size if size else math.inf, rounding, note)
