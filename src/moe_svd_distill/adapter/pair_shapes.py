"""From the keys and shapes of an adapter's header to its pairs and what it saves whole. No tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_svd_distill.adapter.naming import Side, parse_key, whole_key
from moe_svd_distill.errors import BadDataError

_ACTION = "Write the adapter again"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PairShape:
    """Two factors in an adapter's file.

    Attributes:
        module: What they are a pair of, as the file names it.
        key_a: Key of A, (rank, in).
        key_b: Key of B, (out, rank).
        rank: Rows of A and columns of B; of a pair for all experts, theirs together.
        out: Rows of B.
        width: Columns of A.
        embedding: Whether ``B @ A`` is the change of the transpose, as for embeddings.
    """

    module: str
    key_a: str
    key_b: str
    rank: int
    out: int
    width: int
    embedding: bool


def pair_shapes(shapes: Shapes) -> dict[str, PairShape]:
    """The pairs of an adapter by module, in order of the names; `whole_modules` has what is not in pairs.

    Args:
        shapes: Key to shape, from the header.

    Raises:
        BadDataError: A key that PEFT would not match, half a pair, ranks that disagree, or no pair at all.
    """
    sides: dict[str, dict[Side, str]] = {}
    for key in shapes:
        module, side = parse_key(key)
        sides.setdefault(module, {})[side] = key
    if not sides:
        raise BadDataError("the adapter has no LoRA tensors", _ACTION)
    for module, found in sides.items():
        if "whole" in found and len(found) > 1:
            raise BadDataError(f"{module} is saved whole and has a LoRA pair as well, expected one of them", _ACTION)
    pairs = {module: _pair(module, found, shapes) for module, found in sorted(sides.items()) if "whole" not in found}
    if not pairs:
        raise BadDataError(
            f"the adapter only saves {next(iter(sides))} whole, and PEFT loads no adapter without a LoRA pair",
            "Save the head as a LoRA pair of full rank, or add pairs of one class of modules (zeros change nothing)",
        )
    return pairs


def whole_modules(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """The modules whose weight an adapter replaces whole, with its rows and columns; usually none.

    Args:
        shapes: Key to shape, from the header.

    Raises:
        BadDataError: One of them is not a matrix.
    """
    found = {}
    for module in (module for module, side in map(parse_key, shapes) if side == "whole"):
        shape = tuple(shapes[whole_key(module)])
        if len(shape) != 2 or 0 in shape:
            raise BadDataError(f"{whole_key(module)} is {_times(shape)}, expected vocabulary×hidden", _ACTION)
        found[module] = (shape[0], shape[1])
    return found


def _pair(module: str, found: Mapping[Side, str], shapes: Shapes) -> PairShape:
    if len(found) < 2:
        (there,) = found.values()
        lacking = "B" if "A" in found else "A"
        raise BadDataError(f"the {lacking} of {module} is missing, while {there} is there", _ACTION)
    key_a, key_b = found["A"], found["B"]
    shape_a, shape_b = tuple(shapes[key_a]), tuple(shapes[key_b])
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or 0 in shape_a + shape_b:
        raise BadDataError(
            f"{module}: A is {_times(shape_a)} and B is {_times(shape_b)}, expected rank×in and out×rank", _ACTION
        )
    return PairShape(module, key_a, key_b, shape_a[0], shape_b[0], shape_a[1], "lora_embedding" in key_a)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"
