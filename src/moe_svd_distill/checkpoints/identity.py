"""Whether a model is still what it was, and whether it is another one's equal: without reading all of it.

Two questions. What is computed from a model and kept needs a key that changes with any byte of it (`cache_key`): a
result found under the wrong key is wrong without a sign, while one computed again costs time only. A record that
travels needs a name that a copy has as well (`fingerprint`); there a sample of the weights tells models apart.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeAlias

from moe_svd_distill.files.header import Header, TensorInfo
from moe_svd_distill.files.reading import opened, read_at

WHOLE_BYTES = 16 << 20
"""Files up to this size are read, so that small models keep their key where they are copied."""

SAMPLED_TENSORS, SAMPLED_BYTES = 1024, 4096
SCHEME, GGUF_SCHEME = "weights-1:", "gguf-1:"
_SHA256 = re.compile(r"[0-9a-f]{64}")


Extract: TypeAlias = tuple[TensorInfo, int, int]
"""A tensor, and which of its bytes: the first, and how many."""

Read: TypeAlias = Callable[[Sequence[Extract]], Iterable[bytes]]


def cache_key(headers: Mapping[str, Header], paths: Mapping[str, Path], small: Iterable[bytes]) -> str:
    """A digest that changes with any byte of the weights: of the files as they are now.

    A file in the hub's cache counts by the sha256 that is its name there; a small file by its bytes; any other by its
    header, size, and the times of its last modification and of its last change, which nobody can set back.

    Args:
        headers: The model's weights files, by name.
        paths: Where they are, by name.
        small: Content of other files that count.
    """

    def pieces() -> Iterator[bytes]:
        yield from small
        for name, header in sorted(headers.items()):
            path = paths[name]
            with opened(path) as descriptor:
                state = os.fstat(descriptor)
                yield name.encode()
                yield hashlib.sha256(read_at(descriptor, path, 0, min(header.size, state.st_size))).digest()
                blob = path.resolve()
                if state.st_size <= WHOLE_BYTES:
                    yield read_at(descriptor, path, 0, state.st_size)
                elif blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
                    yield blob.name.encode()
                else:
                    yield f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}".encode()

    return digest_of("checkpoint key 3", pieces())


def fingerprint(stored: Mapping[str, TensorInfo], read: Read, *, gguf: bool) -> str:
    """A name for a model's weights, the same wherever they lie and however they are divided into files.

    It covers name, dtype and shape of every stored tensor, and bytes from the middle of up to 1,024 of them: enough to
    tell a model from its relatives of the same shape, and not from one with a few changed bytes.

    Args:
        stored: The tensors as they are in the files.
        read: Gives bytes of tensors.
        gguf: Whether those are GGUF files, where the same weights have other names and types.
    """
    names = sorted(stored)
    table = (f"{name} {stored[name].dtype} {stored[name].shape}".encode() for name in names)
    sample = read([_middle_of(stored[name]) for name in names[:: -(-len(names) // SAMPLED_TENSORS) or 1]])
    return (GGUF_SCHEME if gguf else SCHEME) + digest_of("weights 1", chain(table, sample))


def _middle_of(info: TensorInfo) -> Extract:
    count = min(SAMPLED_BYTES, info.bytes)
    return info, (info.bytes - count) // 2, count


def digest_of(kind: str, pieces: Iterable[bytes]) -> str:
    """A digest of these pieces in this order, which no other division into pieces has, nor another kind."""
    digest = hashlib.sha256(f"{kind}\n".encode())
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()
