"""From the keys and shapes of an adapter's header to its pairs and its head saved whole. No tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_svd_distill.adapter.naming import WHOLE_MODULES, Side, is_embedding, lora_keys, parse_key, whole_key
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


@dataclass(frozen=True)
class WholeShape:
    """A tensor that the adapter replaces whole.

    Attributes:
        hub_name: The replaced tensor ``W (rows, columns)`` in the student's checkpoint.
        key: Key of the new weight, of the same shape.
    """

    hub_name: str
    key: str
    rows: int
    columns: int


def pair_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, PairShape]:
    """The pairs of an adapter by hub name, in order of the names; `whole_shapes` has what is not in pairs.

    Args:
        shapes: Key to shape, from the header.

    Raises:
        BadDataError: A key that PEFT would not match, half a pair, ranks that disagree, or no pair at all.
    """
    sides: dict[str, set[Side]] = {}
    for key in shapes:
        hub_name, side = parse_key(key)
        sides.setdefault(hub_name, set()).add(side)
    if not sides:
        raise BadDataError("the adapter has no LoRA tensors", "Write the adapter again")
    for hub_name, found in sides.items():
        if "whole" in found and len(found) > 1:
            raise BadDataError(
                f"{hub_name} is saved whole and has a LoRA pair as well, expected one of them",
                "Write the adapter again",
            )
    pairs = {name: _pair(name, found, shapes) for name, found in sorted(sides.items()) if "whole" not in found}
    if not pairs:
        raise BadDataError(
            f"the adapter only saves {next(iter(sides))} whole, and PEFT loads no adapter without a LoRA pair",
            "Save the head as a LoRA pair of full rank, or add pairs of one class of modules (zeros change nothing)",
        )
    return pairs


def whole_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, WholeShape]:
    """The tensors that an adapter replaces whole, by hub name; usually none.

    Args:
        shapes: Key to shape, from the header.

    Raises:
        BadDataError: One of them is not a matrix.
    """
    found = {}
    for hub_name in (f"{module}.weight" for module in WHOLE_MODULES):
        key = whole_key(hub_name)
        if key not in shapes:
            continue
        shape = tuple(shapes[key])
        if len(shape) != 2 or 0 in shape:
            raise BadDataError(f"{key} is {_times(shape)}, expected vocabulary×hidden", "Write the adapter again")
        found[hub_name] = WholeShape(hub_name, key, rows=shape[0], columns=shape[1])
    return found


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
