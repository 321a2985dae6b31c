"""Runs of words, found in a plain way, to hold against the hashes of the product."""

from __future__ import annotations

import re


def windows(text: str, size: int = 30) -> set[tuple[str, ...]]:
    """Every run of `size` words, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}
