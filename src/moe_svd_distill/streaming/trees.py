"""What layers are given and return: nested containers of tensors and plain values, and places in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moe_svd_distill.errors import IncompatiblePairError

Path: TypeAlias = tuple[str | int, ...]
_PLAIN = (bool, int, float, str, type(None))
_CONSTANT = (*_PLAIN, torch.dtype, torch.device)


def flatten(tree: Any) -> tuple[Any, list[Tensor]]:
    """The tensors of a tree in order, and all else about it, which JSON can hold.

    Raises:
        IncompatiblePairError: Something in it is neither a container, nor a tensor, nor a plain value.
    """
    if isinstance(tree, Tensor):
        return ["tensor"], [tree]
    if isinstance(tree, _PLAIN):
        return ["value", tree], []
    tensors: list[Tensor] = []

    def of(value: Any) -> Any:
        form, found = flatten(value)
        tensors.extend(found)
        return form

    if isinstance(tree, Mapping) and all(isinstance(key, (str, int)) for key in tree):
        return ["dict", [[key, of(value)] for key, value in tree.items()]], tensors
    if type(tree) in (tuple, list):
        return [type(tree).__name__, [of(value) for value in tree]], tensors
    raise _unknown(tree)


def unflatten(form: Any, tensors: Iterator[Tensor]) -> Any:
    """The tree that `flatten` took apart, with other tensors perhaps."""
    kind, *content = form
    if kind == "tensor":
        return next(tensors)
    if kind == "value":
        return content[0]
    if kind == "dict":
        return {key: unflatten(value, tensors) for key, value in content[0]}
    values = [unflatten(value, tensors) for value in content[0]]
    return tuple(values) if kind == "tuple" else values


def changed(tree: Any, others: tuple[Any, ...], path: Path = ()) -> Iterator[Path]:
    """The places where a tree differs from any of the others: the shallowest at which one value can take another's.

    Raises:
        IncompatiblePairError: It holds something that cannot be compared.
    """
    if isinstance(tree, Tensor):
        if not all(isinstance(o, Tensor) and o.dtype == tree.dtype and torch.equal(o, tree) for o in others):
            yield path
    elif isinstance(tree, _CONSTANT):
        if not all(type(o) is type(tree) and o == tree for o in others):
            yield path
    elif isinstance(tree, Mapping):
        if all(isinstance(o, Mapping) and list(o) == list(tree) for o in others):
            for key, value in tree.items():
                yield from changed(value, tuple(o[key] for o in others), (*path, key))
        else:
            yield path
    elif type(tree) in (tuple, list):
        if all(type(o) is type(tree) and len(o) == len(tree) for o in others):
            for key, value in enumerate(tree):
                yield from changed(value, tuple(o[key] for o in others), (*path, key))
        else:
            yield path
    else:
        raise _unknown(tree)


def at(tree: Any, path: Path) -> Any:
    """What lies at a place."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: Path, value: Any) -> Any:
    """The tree with a value at a place. Dicts and lists, which others may hold too, are changed where they are."""
    if path:
        new = put(tree[path[0]], path[1:], value)
        if isinstance(tree, tuple):
            return tuple(new if place == path[0] else old for place, old in enumerate(tree))
        tree[path[0]] = new
        return tree
    if isinstance(tree, MutableMapping) and isinstance(value, Mapping):
        tree.clear()
        tree.update(value)
        return tree
    if isinstance(tree, list) and isinstance(value, list):
        tree[:] = value
        return tree
    return value


def _unknown(value: Any) -> IncompatiblePairError:
    return IncompatiblePairError(
        f"A decoder layer is given or returns a {type(value).__name__}, expected tensors and plain values",
        "Report the architecture to the project",
    )
