"""Names of an adapter's tensors: what is changed, inside PEFT's prefix and suffix.

Whether PEFT finds a tensor depends on the name alone, and what it does not find it drops without a word. So names are
made and read here only. What is saved whole (``modules_to_save``) has its name behind the prefix and no suffix at all.
"""

from __future__ import annotations

import re
from typing import Literal

from moe_svd_distill.errors import BadDataError

PREFIX = "base_model.model."
Side = Literal["A", "B", "whole"]

_ACTION = "Write the adapter again, or a copy with repaired names"
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding_side>[AB]))"
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


_WRONG = re.compile(
    r"(?:base_model\.model\.)*(?P<module>.+?)(?:\.weight)?\.lora_(?P<embedding>embedding_)?(?P<side>[AB])"
    r"(?:\.default)?(?:\.weight)?"
)


def _why_unmatched(key: str) -> str:
    if not _WRONG.fullmatch(key) and not _WHOLE.fullmatch(key):
        return f"{key}: not the name of a LoRA tensor"
    if not key.startswith(PREFIX):
        return f"{key}: it does not begin with {PREFIX}, so PEFT never matches it"
    if ".weight.lora_" in key:
        return f"{key}: it keeps .weight before the LoRA suffix, which PEFT never matches"
    return f"{key}: PEFT does not match this name, expected {right_name(key)}"
