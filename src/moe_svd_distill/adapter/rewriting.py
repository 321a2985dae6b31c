"""A copy of a safetensors file in which some tensors have other values, under the same names, shapes and dtypes.

The header is copied byte for byte and the data is streamed, so the copy has the same layout and one block of one tensor
is all that is ever in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from moe_svd_distill.adapter.publication import new_file
from moe_svd_distill.checkpoints import TensorInfo
from moe_svd_distill.checkpoints.files import open_regular, read_at
from moe_svd_distill.checkpoints.header import Header, raw_header

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 16 * 1024 * 1024

Change = Callable[[TensorInfo], "Iterator[torch.Tensor] | None"]


def rewrite(source: Header, output: Path, change: Change, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Write the copy.

    Args:
        source: The file's checked header.
        output: The new file; it appears whole or not at all.
        change: For a tensor, None to copy its bytes, or its new value in consecutive blocks of rows, in its own dtype.
        on_bytes: Told the size of each piece that was written.

    Raises:
        CannotWriteError: The disk is full or refuses.
        BadDataError: The source was cut off.
        ValueError: The blocks do not have exactly the tensor's bytes; a fault of the caller.
    """
    descriptor = open_regular(source.file)
    try:
        with new_file(output) as stream:
            stream.write(raw_header(descriptor, source.file, source.file_bytes))
            for info in source.tensors.values():
                blocks = change(info)
                pieces = _stored(descriptor, info) if blocks is None else map(tensor_bytes, blocks)
                _write(stream, info, pieces, on_bytes)
    finally:
        os.close(descriptor)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw data of a tensor, little-endian as safetensors wants it on every supported machine."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def stored_blocks(descriptor: int, path: Path, offset: int, count: int) -> Iterator[bytes]:
    """A stretch of a file in blocks."""
    for begin in range(offset, offset + count, BLOCK_BYTES):
        yield read_at(descriptor, path, begin, min(BLOCK_BYTES, offset + count - begin))


def _stored(descriptor: int, info: TensorInfo) -> Iterator[bytes]:
    return stored_blocks(descriptor, info.file, info.offset, info.bytes)


def _write(
    stream: BinaryIO, info: TensorInfo, pieces: Iterator[bytes] | Iterator[memoryview], on_bytes: Callable[[int], None]
) -> None:
    written = 0
    for piece in pieces:
        stream.write(piece)
        written += len(piece)
        on_bytes(len(piece))
    if written != info.bytes:
        raise ValueError(f"{info.name}: {written} bytes were made, expected {info.bytes}")
