"""The groups of weights that an adapter's scale is given for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from moe_svd_distill.errors import UsageError

Scales: TypeAlias = float | Mapping[str, float]
"""One scale for the whole adapter, or one for each group."""

GROUPS = ("attention", "mlp", "experts", "head", "embeddings")

_PATTERNS = {
    "head": r"(^|\.)(lm_head|embed_out)(\.|$)|^output(\.|$)",
    "embeddings": r"(^|\.)(embed_tokens|word_embeddings|embed_in|embeddings|wte)(\.|$)",
    "attention": r"\.(self_attn|attn|attention|self_attention|linear_attn|mamba)(\.|$)",
    "mlp": r"\.shared_(experts?|mlp)(\.|$)",
    "experts": r"\.(experts|router|block_sparse_moe)(\.|$)|\.(mlp|feed_forward|ffn)\.gate(\.|$)",
}


def group_of(name: str) -> str:
    """Return the group of a module or tensor name; what belongs to no other is `mlp`."""
    return next((group for group, pattern in _PATTERNS.items() if re.search(pattern, name)), "mlp")


def by_group(scales: Scales, groups: Iterable[str]) -> dict[str, float]:
    """A scale for each of the groups.

    Raises:
        UsageError: A group has none.
    """
    wanted = sorted(set(groups))
    if not isinstance(scales, Mapping):
        return dict.fromkeys(wanted, float(scales))
    if missing := [group for group in wanted if group not in scales]:
        raise UsageError(f"No scale is given for {', '.join(missing)}", f"Give one for each of {', '.join(wanted)}")
    return {group: float(scales[group]) for group in wanted}
