"""From the keys and shapes of an adapter's header to its pairs. No tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_svd_distill.adapter.naming import Side, is_embedding, lora_keys, parse_key
from moe_svd_distill.errors import BadDataError


@dataclass(frozen=True)
class PairShape:
    """One low-rank pair and the tensor it changes.

    Attributes:
        hub_name: The changed tensor ``W (rows, columns)`` in the student's checkpoint.
        key_a: Key of A: ``(rank, columns)``, or ``(rank, rows)`` for embeddings.
        key_b: Key of B: ``(rows, rank)``, or ``(columns, rank)`` for embeddings.
        rank: Rows of A and columns of B.
    """

    hub_name: str
    key_a: str
    key_b: str
    rank: int
    rows: int
    columns: int

    @property
    def transposed(self) -> bool:
        """Whether ``B @ A`` is the change of the transpose of W, as for embeddings."""
        return is_embedding(self.hub_name)


def pair_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, PairShape]:
    """The pairs of an adapter by hub name, in order of the names.

    Args:
        shapes: Key to shape, from the header.

    Raises:
        BadDataError: A key that PEFT would not match, half a pair, or ranks that disagree.
    """
    sides: dict[str, set[Side]] = {}
    for key in shapes:
        hub_name, side = parse_key(key)
        sides.setdefault(hub_name, set()).add(side)
    if not sides:
        raise BadDataError("the adapter has no LoRA tensors", "Write the adapter again")
    return {hub_name: _pair(hub_name, found, shapes) for hub_name, found in sorted(sides.items())}


def _pair(hub_name: str, found: set[Side], shapes: Mapping[str, tuple[int, ...]]) -> PairShape:
    key_a, key_b = lora_keys(hub_name)
    if len(found) < 2:
        missing, there = (key_b, key_a) if "A" in found else (key_a, key_b)
        raise BadDataError(f"{missing} is missing, while {there} is there", "Write the adapter again")
    shape_a, shape_b = tuple(shapes[key_a]), tuple(shapes[key_b])
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or 0 in shape_a + shape_b:
        raise BadDataError(
            f"{hub_name}: A is {_times(shape_a)} and B is {_times(shape_b)}, expected rank×in and out×rank",
            "Write the adapter again",
        )
    rows, columns = shape_b[0], shape_a[1]
    if is_embedding(hub_name):
        rows, columns = columns, rows
    return PairShape(hub_name, key_a, key_b, rank=shape_a[0], rows=rows, columns=columns)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"
