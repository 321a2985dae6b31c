"""Copies of a model's files: of a safetensors file with other values under the same names, shapes and dtypes; and of
the files beside the weights that make a model usable.

The header is copied byte for byte and the data is streamed, so the copy has the same layout and one block of one tensor
is all that is ever in memory. One tensor may be added behind the others; the header then has one entry more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.checkpoints import TensorInfo
from moe_svd_distill.files.dtypes import tensor_bytes
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


def rewrite(
    source: Header,
    output: Path,
    change: Change,
    on_bytes: Callable[[int], None] = lambda _: None,
    added: TensorInfo | None = None,
) -> None:
    """Write the copy.

    Args:
        source: The file's checked header.
        output: The new file; it appears whole or not at all.
        change: For a tensor, None to copy its bytes, or its new value in consecutive blocks of rows, in its own dtype.
        on_bytes: Told the size of each piece that was written.
        added: A tensor that the copy has behind the others and the source has not, if this is the file to add it to.

    Raises:
        CannotWriteError: The disk is full or refuses.
        BadDataError: The source was cut off.
        ValueError: The blocks do not have exactly the tensor's bytes; a fault of the caller.
    """
    with opened(source.file) as descriptor, durable_file(output) as stream:
        header = raw_header(descriptor, source.file, source.file_bytes)
        news = [added] if added is not None and added.file == source.file else []
        stream.write(_with_entry(header, news[0]) if news else header)
        for info in (*source.tensors.values(), *news):
            blocks = change(info)
            stored = read_pieces(descriptor, source.file, info.offset, info.offset + info.bytes)
            _write(stream, info, stored if blocks is None else map(tensor_bytes, blocks), on_bytes)


def _with_entry(header: bytes, added: TensorInfo) -> bytes:
    content: dict[str, object] = json.loads(header[PREFIX_BYTES:])
    begin = added.offset - len(header)
    content[added.name] = {
        "dtype": added.dtype,
        "shape": list(added.shape),
        "data_offsets": [begin, begin + added.bytes],
    }
    return packed_header(content, copied=True)


def _write(stream: Sink, info: TensorInfo, pieces: Iterator[memoryview], on_bytes: Callable[[int], None]) -> None:
    written = 0
    for piece in pieces:
        stream.write(piece)
        written += len(piece)
        on_bytes(len(piece))
    if written != info.bytes:
        raise ValueError(f"{info.name}: {written} bytes were made, expected {info.bytes}")


def copy_companions(
    source: Path, output: Path, weights: Collection[Path], changed: Mapping[str, bytes]
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
            content = changed.get(name.as_posix())
            for block in iter(partial(stream.read, _BLOCK_BYTES), b"") if content is None else (content,):
                copy.write(block)
        copied.append(name.as_posix())
    for added in changed.keys() - set(copied):
        with durable_file(output / added) as copy:
            copy.write(changed[added])
    return tuple(copied), tuple(left_out)
