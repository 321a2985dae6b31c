"""Names of an adapter's tensors: the hub name of the changed tensor inside PEFT's prefix and suffix.

Whether PEFT finds a tensor depends on the name alone, and what it does not find it drops without a word. So names are
made and read here only. A head that is saved whole (``modules_to_save``) has its hub name behind the prefix and no
suffix at all.
"""

from __future__ import annotations

import re
from typing import Literal

from moe_svd_distill.errors import BadDataError

PREFIX = "base_model.model."
EMBEDDING_LEAVES = frozenset({"embed_tokens"})
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
WHOLE_MODULES = ("lm_head",)
"""The modules that an adapter may replace whole, as ``modules_to_save`` names them."""

Side = Literal["A", "B", "whole"]

_ACTION = "Write the adapter again, or a copy with repaired names"
_WHOLE_HEAD = re.compile(r"(?:base_model\.model\.)*lm_head(?:\.modules_to_save(?:\.default)?)?\.weight")
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding_side>[AB]))"
)


def lora_keys(hub_name: str) -> tuple[str, str]:
    """The keys of the pair that changes a hub tensor.

    For ``W (rows, columns)`` they hold ``A (r, columns)`` and ``B (rows, r)``; for the embeddings ``W (V, H)`` they
    hold the transpose, ``A (r, V)`` and ``B (H, r)``.

    Args:
        hub_name: Name of the tensor in the student's checkpoint, for example
            ``model.layers.0.self_attn.q_proj.weight``.

    Raises:
        BadDataError: The tensor is not a weight.
    """
    module = hub_name.removesuffix(".weight")
    if module == hub_name or not module:
        raise BadDataError(f"{hub_name}: expected a name that ends in .weight", "Give a pair for weights only")
    if is_embedding(hub_name):
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def whole_key(hub_name: str = HEAD) -> str:
    """The key of a tensor that the adapter replaces whole: the new weight itself ``(V, d)``, not a change of it.

    Raises:
        BadDataError: The tensor is not the head; of other modules no loader takes a replacement.
    """
    if hub_name.removesuffix(".weight") not in WHOLE_MODULES or not hub_name.endswith(".weight"):
        raise BadDataError(f"{hub_name}: only {HEAD} can be saved whole", "Give a LoRA pair for it")
    return f"{PREFIX}{hub_name}"


def parse_key(key: str) -> tuple[str, Side]:
    """The hub name of a key and what it holds: the inverse of `lora_keys` and `whole_key`.

    Raises:
        BadDataError: PEFT would not match the key, and why.
    """
    if key in {whole_key(f"{module}.weight") for module in WHOLE_MODULES}:
        return key.removeprefix(PREFIX), "whole"
    match = _KEY.fullmatch(key)
    side = match and (match["side"] or match["embedding_side"])
    if match is None or side not in ("A", "B"):
        raise BadDataError(_why_unmatched(key), _ACTION)
    hub_name = f"{match['module']}.weight"
    if key not in lora_keys(hub_name) or _fault_of_module(match["module"]):
        raise BadDataError(_why_unmatched(key), _ACTION)
    return hub_name, "A" if side == "A" else "B"


def is_whole_head(key: str) -> bool:
    """Whether a key, rightly spelt or not, means a head that is saved whole: no LoRA factor, and no copy of the base.

    Known wrong spellings: no ``base_model.model.`` in front, that prefix twice, PEFT's name in memory
    (``lm_head.modules_to_save.default.weight``), or without the adapter's name in it.
    """
    return bool(_WHOLE_HEAD.fullmatch(key))


def is_embedding(hub_name: str) -> bool:
    """Whether the tensor is an embedding matrix, whose pair PEFT keeps transposed."""
    return hub_name.removesuffix(".weight").rpartition(".")[2] in EMBEDDING_LEAVES


def _fault_of_module(module: str) -> str:
    if module.endswith(".weight"):
        return "it keeps .weight before the LoRA suffix, which PEFT never matches"
    if module.endswith((".base_layer", ".experts")):
        return "it is PEFT's layout of fused experts, expected one pair per expert under the hub names"
    return ""


def _why_unmatched(key: str) -> str:
    module = re.sub(r"\.lora_(embedding_)?[AB](\.default)?(\.weight)?\Z", "", key)
    if module == key and is_whole_head(key):
        return f"{key}: PEFT does not match this name of a head saved whole, expected {whole_key()}"
    if module == key:
        return f"{key}: not the name of a LoRA tensor"
    if not key.startswith(PREFIX):
        return f"{key}: it does not begin with {PREFIX}, so PEFT never matches it"
    if fault := _fault_of_module(module):
        return f"{key}: {fault}"
    expected = lora_keys(f"{module}.weight")
    return f"{key}: PEFT does not match this name, expected {expected[0]} and {expected[1]}"
