"""What stored zero points say of themselves, where config.json may say otherwise.

A symmetric quantisation has the middle of its codes for every zero point, so its zero points show how they were stored.
A look at the beginning of a few tensors is enough: zero points that differ from each other do so there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from moe_svd_distill.checkpoints.configuration import USE_PLAIN
from moe_svd_distill.checkpoints.quantisation.weights import Weights
from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.header import TensorInfo

LOOKED_AT, LOOKED_AT_BYTES = 16, 3072
_UNKNOWN = -1


def uniform_value(weights: Weights, zero: TensorInfo, bits: int, along: int) -> int | None:
    """The one value of all packed zero points that are looked at; None where they differ or the file is not at hand.

    Args:
        weights: Where to read.
        zero: Words of 32 bits, packed along one dimension.
        bits: Of a zero point.
        along: How many are packed into the first row, where they are packed along the rows.
    """
    row = 4 * zero.shape[-1]
    raw = weights.read_bytes(zero, min(row, LOOKED_AT_BYTES))
    if not raw:
        return None
    count = min(along, len(raw) * 8 // bits)
    stream = int.from_bytes(raw, "little") & ((1 << bits * count) - 1)
    value = stream & (2**bits - 1)
    every = ((1 << bits * count) - 1) // (2**bits - 1)
    return value if stream == value * every else _UNKNOWN


def settled_offset(
    weights: Weights, zeros: Collection[tuple[TensorInfo, int, int]], labelled: int, *, symmetric: bool
) -> int:
    """What the stored zero points of a GPTQ model lack: the middle less what is stored, where that is 0 or 1.

    Args:
        weights: Where to read.
        zeros: Words, bits, and how many are in a row, of some modules.
        labelled: What config.json says.
        symmetric: Whether it says that every zero point is the middle.

    Raises:
        BadDataError: The data contradict what config.json says, and do not say themselves what is meant.
    """
    found = dict[int | None, str]()
    for zero, bits, along in _some(zeros):
        value = uniform_value(weights, zero, bits, along)
        if value is not None:
            lacking = 2 ** (bits - 1) - value
            found.setdefault(lacking if value != _UNKNOWN and lacking in (0, 1) else None, zero.name)
    if not found:
        return labelled
    if len(found) == 1 and None not in found:
        return next(offset for offset in found if offset is not None)
    if symmetric or {0, 1} <= found.keys():
        what = "are those of both GPTQ formats" if None not in found else "are not all the middle of the codes"
        names = " and ".join(map(shown, found.values()))
        raise BadDataError(f"the zero points of {names} {what}, as config.json (sym) has them", USE_PLAIN)
    return labelled


def refuse_unless_middle(weights: Weights, zero: TensorInfo, bits: int, along: int, said: str) -> None:
    """Note zero points that config.json says there are none of, unless they are the middle and change nothing.

    Args:
        weights: Where to read and to note.
        zero: Words with unsigned zero points, or numbers with signed ones.
        bits: Of a zero point in a word.
        along: As of `uniform_value`.
        said: What config.json says.
    """
    if zero.dtype == "I32":
        value = uniform_value(weights, zero, bits, along)
        fits = value in (None, 2 ** (bits - 1))
    else:
        raw = weights.read_bytes(zero, min(zero.bytes, LOOKED_AT_BYTES))
        fits = raw is None or not any(raw)
    if not fits:
        weights.fault(f"{shown(zero.name)} holds zero points, but config.json says {said}", USE_PLAIN)


def _some(zeros: Collection[tuple[TensorInfo, int, int]]) -> Iterable[tuple[TensorInfo, int, int]]:
    return list(zeros)[:: max(1, len(zeros) // LOOKED_AT)]
