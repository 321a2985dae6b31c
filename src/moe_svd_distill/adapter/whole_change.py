"""What a head saved whole changes, and how much of that is the rounding of its stored dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_svd_distill.adapter.blocks import row_blocks
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.whole_head import base_head, change_norm, norm_of_blocks
from moe_svd_distill.architecture.architecture import Architecture

if TYPE_CHECKING:
    import torch

SIGNIFICANT_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
_MUCH = 0.05
"""The share of the change from which its rounding is worth a warning: a twentieth shows in the logits."""


@dataclass(frozen=True)
class WholeChange:
    """What a head that is saved whole changes.

    Attributes:
        relative: ``‖W' - W‖ / ‖W‖``.
        rounding: The expected norm of the rounding of W' to its stored dtype, as a share of ``‖W' - W‖``; None where
            nothing changes.
        note: What a reader should know, or nothing.
    """

    relative: float
    rounding: float | None
    note: str = ""


def change_of_head(pairs: LowRankPairs, architecture: Architecture) -> WholeChange | None:
    """Compare a head that an adapter saves whole with the student's own; None where it saves none.

    Raises:
        BadDataError: The student's head is not stored as floating-point numbers.
    """
    if pairs.head is None:
        return None
    base, new, dtype = base_head(architecture), pairs.read_head(), pairs.header.tensors[pairs.head].dtype
    name = architecture.head
    change, size = change_norm(new, base), norm_of_blocks(base[rows] for rows in row_blocks(*base.shape))
    if not change:
        return WholeChange(0.0, None, f"{name} is saved whole and is the student's own: it changes nothing")
    rounding = rounding_norm(new, SIGNIFICANT_BITS[dtype]) / change
    note = ""
    if rounding > _MUCH:
        note = (
            f"{name} is saved whole in {dtype} and differs from the student's by {change / size:.2%} of its norm: "
            f"rounding alone makes about {rounding:.0%} of that; a LoRA pair would keep the change"
        )
    return WholeChange(change / size if size else math.inf, rounding, note)


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
