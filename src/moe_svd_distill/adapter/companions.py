"""The files beside the weights that make a model usable: configuration, tokenizer, index, licence."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

from moe_svd_distill.files.reading import locate
from moe_svd_distill.files.writing import durable_file

_BLOCK_BYTES = 1 << 20
_OTHER_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".msgpack", ".h5", ".npz"}
)


def copy_companions(
    source: Path, output: Path, weights: Collection[Path], changed: Mapping[str, bytes] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copy all files of a model but its weights.

    Weights in further formats are left out: they would still be the unmerged ones. Hidden files are left out as well.

    Args:
        source: The model's folder.
        output: The folder to copy into.
        weights: The weights files, which are written elsewhere.
        changed: Files that are written with other content than the model's, by their name in its folder.

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
    return tuple(copied), tuple(left_out)
