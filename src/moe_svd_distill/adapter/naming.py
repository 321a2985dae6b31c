"""Names of an adapter's tensors: what is changed, inside PEFT's prefix and suffix; and the pairs that they make.

Whether PEFT finds a tensor depends on the name alone, and what it does not find it drops without a word. So names are
made and read here only. What is saved whole (``modules_to_save``) has its name behind the prefix and no suffix at all.
No tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moe_svd_distill.errors import BadDataError

PREFIX = "base_model.model."
Side = Literal["A", "B", "whole"]
Shapes = Mapping[str, tuple[int, ...]]
"""Key of an adapter's file to shape, from the header."""

_ACTION = "Write the adapter again, or a copy with repaired names"
_AGAIN = "Write the adapter again"
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding_side>[AB]))"
)
_WRONG = re.compile(
    r"(?:base_model\.model\.)*(?P<module>.+?)(?:\.weight)?\.lora_(?P<embedding>embedding_)?(?P<side>[AB])"
    r"(?:\.default)?(?:\.weight)?"
)
_WHOLE = re.compile(r"(?:base_model\.model\.)*(?P<module>.+?)\.modules_to_save(?:\.default)?\.weight")


def lora_keys(module: str, *, embedding: bool = False) -> tuple[str, str]:
    """The keys of A and B of a pair.

    For ``W (rows, columns)`` they hold ``A (r, columns)`` and ``B (rows, r)``; for embeddings ``W (V, H)`` they hold
    the transpose, ``A (r, V)`` and ``B (H, r)``.

    Args:
        module: Stored name of the matrix without ``.weight``, or what PEFT calls it.
        embedding: Whether it is a table of embeddings.
    """
    if embedding:
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def whole_key(module: str) -> str:
    """The key of a weight that the adapter replaces whole: the new values themselves, not a change of them."""
    return f"{PREFIX}{module}.weight"


def parse_key(key: str) -> tuple[str, Side]:
    """The module of a key and what it holds: the inverse of `lora_keys` and `whole_key`.

    Raises:
        BadDataError: PEFT would not match the key, and why.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        if key.startswith(PREFIX) and key.endswith(".weight") and ".lora_" not in key and not _WHOLE.fullmatch(key):
            return key.removeprefix(PREFIX).removesuffix(".weight"), "whole"
        raise BadDataError(_why_unmatched(key), _ACTION)
    if match["module"].endswith(".weight"):
        raise BadDataError(_why_unmatched(key), _ACTION)
    return match["module"], "A" if "A" in (match["side"], match["embedding_side"]) else "B"


def right_name(key: str) -> str:
    """A key that PEFT matches, from one of the known wrong spellings of it.

    These are: ``.weight`` kept before the LoRA suffix, no ``base_model.model.`` in front or that twice, PEFT's adapter
    name inside (``.lora_A.default.weight``), no ``.weight`` behind; of what is saved whole, PEFT's name in memory.

    Raises:
        BadDataError: It is no misspelt name of an adapter's tensor.
    """
    if match := _WHOLE.fullmatch(key):
        return whole_key(match["module"])
    match = _WRONG.fullmatch(key)
    if match is None:
        if re.fullmatch(r"(?:base_model\.model\.)*(lm_head|embed_out)\.weight", key):
            return whole_key(key.removesuffix(".weight").rpartition(".")[2])
        raise BadDataError(f"{key}: not the name of a LoRA tensor, in no known spelling", _ACTION)
    return lora_keys(match["module"], embedding=bool(match["embedding"]))["AB".index(match["side"])]


def _why_unmatched(key: str) -> str:
    if not _WRONG.fullmatch(key) and not _WHOLE.fullmatch(key):
        return f"{key}: not the name of a LoRA tensor"
    if not key.startswith(PREFIX):
        return f"{key}: it does not begin with {PREFIX}, so PEFT never matches it"
    if ".weight.lora_" in key:
        return f"{key}: it keeps .weight before the LoRA suffix, which PEFT never matches"
    return f"{key}: PEFT does not match this name, expected {right_name(key)}"


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

    Raises:
        BadDataError: A key that PEFT would not match, half a pair, ranks that disagree, or no pair at all.
    """
    sides: dict[str, dict[Side, str]] = {}
    for key in shapes:
        module, side = parse_key(key)
        sides.setdefault(module, {})[side] = key
    if not sides:
        raise BadDataError("the adapter has no LoRA tensors", _AGAIN)
    for module, found in sides.items():
        if "whole" in found and len(found) > 1:
            raise BadDataError(f"{module} is saved whole and has a LoRA pair as well, expected one of them", _AGAIN)
    pairs = {module: _pair(module, found, shapes) for module, found in sorted(sides.items()) if "whole" not in found}
    if not pairs:
        raise BadDataError(
            f"the adapter only saves {next(iter(sides))} whole, and PEFT loads no adapter without a LoRA pair",
            "Save the head as a LoRA pair of full rank, or add pairs of one class of modules (zeros change nothing)",
        )
    return pairs


def whole_modules(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """The modules whose weight an adapter replaces whole, with its rows and columns; usually none.

    Raises:
        BadDataError: One of them is not a matrix.
    """
    found = {}
    for module in (module for module, side in map(parse_key, shapes) if side == "whole"):
        shape = tuple(shapes[whole_key(module)])
        if len(shape) != 2 or 0 in shape:
            raise BadDataError(f"{whole_key(module)} is {_times(shape)}, expected vocabulary×hidden", _AGAIN)
        found[module] = (shape[0], shape[1])
    return found


def _pair(module: str, found: Mapping[Side, str], shapes: Shapes) -> PairShape:
    if len(found) < 2:
        (there,) = found.values()
        lacking = "B" if "A" in found else "A"
        raise BadDataError(f"the {lacking} of {module} is missing, while {there} is there", _AGAIN)
    key_a, key_b = found["A"], found["B"]
    shape_a, shape_b = tuple(shapes[key_a]), tuple(shapes[key_b])
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or 0 in shape_a + shape_b:
        raise BadDataError(
            f"{module}: A is {_times(shape_a)} and B is {_times(shape_b)}, expected rank×in and out×rank", _AGAIN
        )
    return PairShape(module, key_a, key_b, shape_a[0], shape_b[0], shape_a[1], "lora_embedding" in key_a)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"
