"""Arguments of a layer: nested tuples, lists and dicts of tensors and plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_svd_distill.errors import IncompatiblePairError

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with every tensor changed; a tensor that occurs twice is changed once.

    Raises:
        IncompatiblePairError: Something in it is neither a container, nor a tensor, nor a plain value.
    """
    done: dict[int, Tensor] = {}

    def go(node: Any) -> Any:
        if isinstance(node, Tensor):
            if id(node) not in done:
                done[id(node)] = change(node)
            return done[id(node)]
        if isinstance(node, _PLAIN):
            return node
        if type(node) in (tuple, list):
            return type(node)(go(value) for value in node)
        if type(node) is dict:
            return {key: go(value) for key, value in node.items()}
        raise IncompatiblePairError(
            f"A decoder layer is given a {type(node).__name__}, expected tensors and plain values",
            "Report the architecture to the project",
        )

    return go(tree)


def same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same values; what is not known to be equal is different."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, _PLAIN) and one == other
