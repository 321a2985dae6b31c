"""A copy of a safetensors file in which some tensors have other values, under the same names, shapes and dtypes.

The header is copied byte for byte and the data is streamed, so the copy has the same layout and one block of one tensor
is all that is ever in memory. One tensor may be added behind the others; the header then has one entry more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.checkpoints import TensorInfo
from moe_svd_distill.checkpoints.files import open_regular, read_at
from moe_svd_distill.checkpoints.header import BYTES_PER_ELEMENT, PREFIX_BYTES, Header, raw_header
from moe_svd_distill.execution.durable import Sink, durable_file

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 16 * 1024 * 1024

Change = Callable[[TensorInfo], "Iterator[torch.Tensor] | None"]


@dataclass(frozen=True)
class Addition:
    """A tensor that the copy has and the source has not.

    Attributes:
        dtype: As a header names it.
        blocks: Its values in consecutive blocks of rows, in its own dtype.
    """

    name: str
    dtype: str
    shape: tuple[int, int]
    blocks: Iterator[torch.Tensor]

    @property
    def bytes(self) -> int:
        """The size of its data."""
        return self.shape[0] * self.shape[1] * BYTES_PER_ELEMENT[self.dtype]


def rewrite(
    source: Header,
    output: Path,
    change: Change,
    on_bytes: Callable[[int], None] = lambda _: None,
    addition: Addition | None = None,
) -> None:
    """Write the copy.

    Args:
        source: The file's checked header.
        output: The new file; it appears whole or not at all.
        change: For a tensor, None to copy its bytes, or its new value in consecutive blocks of rows, in its own dtype.
        on_bytes: Told the size of each piece that was written.
        addition: A tensor to write behind the others.

    Raises:
        CannotWriteError: The disk is full or refuses.
        BadDataError: The source was cut off.
        ValueError: The blocks do not have exactly the tensor's bytes; a fault of the caller.
    """
    descriptor = open_regular(source.file)
    try:
        with durable_file(output) as stream:
            header = raw_header(descriptor, source.file, source.file_bytes)
            stream.write(header if addition is None else _with_entry(header, addition))
            for info in source.tensors.values():
                blocks = change(info)
                pieces = _stored(descriptor, info) if blocks is None else map(tensor_bytes, blocks)
                _write(stream, info.name, info.bytes, pieces, on_bytes)
            if addition is not None:
                _write(stream, addition.name, addition.bytes, map(tensor_bytes, addition.blocks), on_bytes)
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


def packed_header(content: dict[str, Any]) -> bytes:
    """A safetensors header with its length in front, padded to eight bytes as the library does."""
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % PREFIX_BYTES)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


def _with_entry(header: bytes, addition: Addition) -> bytes:
    content: dict[str, Any] = json.loads(header[PREFIX_BYTES:])
    end = max((entry["data_offsets"][1] for name, entry in content.items() if name != "__metadata__"), default=0)
    content[addition.name] = {
        "dtype": addition.dtype,
        "shape": list(addition.shape),
        "data_offsets": [end, end + addition.bytes],
    }
    return packed_header(content)


def _write(
    stream: Sink,
    name: str,
    expected: int,
    pieces: Iterator[bytes] | Iterator[memoryview],
    on_bytes: Callable[[int], None],
) -> None:
    written = 0
    for piece in pieces:
        stream.write(piece)
        written += len(piece)
        on_bytes(len(piece))
    if written != expected:
        raise ValueError(f"{name}: {written} bytes were made, expected {expected}")
