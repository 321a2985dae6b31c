"""A head that an adapter saves whole, next to the student's own: what they differ by, and the points between them.

A LoRA pair is a change and needs nothing else. A head saved whole is the new weight ``W'``; its change ``W' - W``
exists only beside the student's ``W``. So whatever scales, compares or replaces the change asks for the student here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.checkpoints import TensorInfo
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.files.dtypes import FLOATS

BLOCK_ELEMENTS = 1024 * 1024  # 4 MiB in fp32: the allocator hands such blocks out again, larger ones are mapped anew
SIGNIFICANT_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
_MUCH = 0.05
"""The share of the change from which its rounding is worth a warning: a twentieth shows in the logits."""


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Consecutive stretches of rows, small enough that arithmetic in a wider dtype needs no second copy of a matrix."""
    step = max(1, BLOCK_ELEMENTS // columns)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def base_head(architecture: Architecture) -> torch.Tensor:
    """The student's own head ``(V, d)`` as stored; the rest of the student may be quantised.

    Raises:
        BadDataError: It is not stored as floating-point numbers.
    """
    name = architecture.embedding if architecture.tied else architecture.head
    refuse_codes(architecture.checkpoint[name])
    return architecture.checkpoint.read(name)


def refuse_codes(info: TensorInfo) -> None:
    """Refuse a tensor of the student that is not stored as floating-point numbers."""
    if info.dtype not in FLOATS:
        raise BadDataError(
            f"{info.name} is {info.dtype} in the student, expected one of {', '.join(FLOATS)}",
            "Use the unquantised student",
        )


def change_norm(new: torch.Tensor, base: torch.Tensor) -> float:
    """The Frobenius norm of ``W' - W``, both ``(V, d)``: differences in fp32, summed in double precision."""
    return norm_of_blocks(new[rows].float() - base[rows].float() for rows in row_blocks(*new.shape))


def norm_of_blocks(blocks: Iterable[torch.Tensor]) -> float:
    """The Frobenius norm of a matrix given in blocks of rows, summed in double precision."""
    return math.hypot(*(float(torch.linalg.vector_norm(block, dtype=torch.float64)) for block in blocks))


def replaced_blocks(new: torch.Tensor, dtype: torch.dtype, what: str) -> Iterator[torch.Tensor]:
    """A new weight ``(V, d)`` in blocks of rows, rounded to ``dtype``.

    Raises:
        BadDataError: A value leaves the range of ``dtype``.
    """
    for rows in row_blocks(*new.shape):
        block = new[rows].to(dtype)
        if not bool(torch.isfinite(block).all()):
            raise BadDataError(f"{what}: merged values that are not finite in {dtype}", "Verify the adapter")
        yield block


def change_of_head(pairs: LowRankPairs, architecture: Architecture) -> tuple[float, str] | None:
    """How much a head that an adapter saves whole differs from the student's own; None where it saves none.

    Returns:
        ``‖W' - W‖ / ‖W‖``, and what a reader should know of it, or nothing.

    Raises:
        BadDataError: The student's head is not stored as floating-point numbers.
    """
    if pairs.head is None:
        return None
    base, new, dtype = base_head(architecture), pairs.read_head(), pairs.header.tensors[pairs.head].dtype
    name = architecture.head
    change, size = change_norm(new, base), norm_of_blocks(base[rows] for rows in row_blocks(*base.shape))
    if not change:
        return 0.0, f"{name} is saved whole and is the student's own: it changes nothing"
    rounding = rounding_norm(new, SIGNIFICANT_BITS[dtype]) / change
    note = ""
    if rounding > _MUCH:
        note = (
            f"{name} is saved whole in {dtype} and differs from the student's by {change / size:.2%} of its norm: "
            f"rounding alone makes about {rounding:.0%} of that; a LoRA pair would keep the change"
        )
    return change / size if size else math.inf, note


def rounding_norm(values: torch.Tensor, bits: int) -> float:
    """The expected norm of the error of rounding a matrix to so many significant bits, to nearest.

    The error of a value with the unit in the last place u is uniform in ±u/2: its mean square is u²/12.
    """
    # The exponent bits of an fp32 value alone are the power of two below it; its unit is 2^(1 - bits) of that.
    powers = (
        (values[rows].float().view(torch.int32) & 0x7F800000).view(torch.float32) for rows in row_blocks(*values.shape)
    )
    return norm_of_blocks(powers) * 2.0 ** (1 - bits) / math.sqrt(12)
