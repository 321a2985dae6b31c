"""Copies of a model's files: of a safetensors file with other values under the same names, shapes and dtypes; and of
the files beside the weights that make a model usable.

The header is copied byte for byte and the data is streamed, so the copy has the same layout and one block of one tensor
is all that is ever in memory. One tensor may be added behind the others; the header then has one entry more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.checkpoints import TensorInfo
from moe_svd_distill.files.dtypes import BYTES_PER_ELEMENT, tensor_bytes
from moe_svd_distill.files.header import PREFIX_BYTES, Header, packed_header, raw_header
from moe_svd_distill.files.reading import locate, opened, read_pieces
from moe_svd_distill.files.writing import Sink, durable_file

if TYPE_CHECKING:
    import torch


_BLOCK_BYTES = 1 << 20
_OTHER_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".msgpack", ".h5", ".npz"}
)
Change = Callable[[TensorInfo], "Iterator[torch.Tensor] | None"]


@dataclass(frozen=True)
class Addition:
    """A tensor that the copy has and the source has not.

    Attributes:
        file: The source.
        dtype: As a header names it.
        blocks: Its values in consecutive blocks of rows, in its own dtype.
    """

    file: Path
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
        addition: A tensor to write behind the others, if this is the file to add it to.

    Raises:
        CannotWriteError: The disk is full or refuses.
        BadDataError: The source was cut off.
        ValueError: The blocks do not have exactly the tensor's bytes; a fault of the caller.
    """
    with opened(source.file) as descriptor, durable_file(output) as stream:
        header = raw_header(descriptor, source.file, source.file_bytes)
        addition = addition if addition is not None and addition.file == source.file else None
        stream.write(header if addition is None else _with_entry(header, addition))
        for info in source.tensors.values():
            blocks = change(info)
            stored = read_pieces(descriptor, source.file, info.offset, info.offset + info.bytes)
            _write(stream, info.name, info.bytes, stored if blocks is None else map(tensor_bytes, blocks), on_bytes)
        if addition is not None:
            _write(stream, addition.name, addition.bytes, map(tensor_bytes, addition.blocks), on_bytes)


def _with_entry(header: bytes, addition: Addition) -> bytes:
    content: dict[str, Any] = json.loads(header[PREFIX_BYTES:])
    end = max((entry["data_offsets"][1] for name, entry in content.items() if name != "__metadata__"), default=0)
    content[addition.name] = {
        "dtype": addition.dtype,
        "shape": list(addition.shape),
        "data_offsets": [end, end + addition.bytes],
    }
    return packed_header(content, copied=True)


def _write(
    stream: Sink, name: str, expected: int, pieces: Iterator[memoryview], on_bytes: Callable[[int], None]
) -> None:
    written = 0
    for piece in pieces:
        stream.write(piece)
        written += len(piece)
        on_bytes(len(piece))
    if written != expected:
        raise ValueError(f"{name}: {written} bytes were made, expected {expected}")


def copy_companions(
    source: Path, output: Path, weights: Collection[Path], changed: Mapping[str, bytes] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copy all files of a model but its weights.

    Weights in further formats are left out: they would still be the unmerged ones. Hidden files are left out as well.

    Args:
        source: The model's folder.
        output: The folder to copy into.
        weights: The weights files, which are written elsewhere.
        changed: Files that are written with other content than the model's, or that it does not have, by their name.

    Returns:
        Names of the files copied, and of those left out.

    Raises:
        BadDataError: A link that leads out of the model's folder.
        CannotWriteError: The disk is full or refuses.
    """
    copied, left_out = [], []
    for path in sorted(source.rglob("*")):
        if path.is_dir() or path in weights:
            continue
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or path.suffix.lower() in _OTHER_WEIGHTS:
            left_out.append(name.as_posix())
            continue
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        with locate(source, name.as_posix()).open("rb") as stream, durable_file(output / name) as copy:
            content = (changed or {}).get(name.as_posix())
            for block in iter(partial(stream.read, _BLOCK_BYTES), b"") if content is None else (content,):
                copy.write(block)
        copied.append(name.as_posix())
    for added in (changed or {}).keys() - set(copied):
        with durable_file(output / added) as copy:
            copy.write((changed or {})[added])
    return tuple(copied), tuple(left_out)
