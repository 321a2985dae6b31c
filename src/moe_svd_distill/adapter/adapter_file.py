"""The files of an adapter's folder: header, JSON, tensors one at a time, digest, and what is in the values."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.adapter.naming import parse_key
from moe_svd_distill.checkpoints import TensorInfo
from moe_svd_distill.errors import BadDataError, DistillError
from moe_svd_distill.files.dtypes import FLOATS
from moe_svd_distill.files.header import Header, read_header
from moe_svd_distill.files.names import ADAPTER_FILE
from moe_svd_distill.files.reading import json_object, opened, read_small

if TYPE_CHECKING:
    import torch


_ACTION = "Write or copy the adapter again"
_WRITE_AGAIN = "Write the adapter again"
TAIL_BYTES = 4096
"""Zeros at the end of a file that are taken for a broken write."""


def adapter_header(path: Path | str) -> Header:
    """The checked header of an adapter's file, given the file or its folder.

    Raises:
        MissingInputError: There is no such file.
        BadDataError: The header is not valid, or does not describe exactly the bytes that follow it.
    """
    place = Path(path)
    try:
        return read_header(place / ADAPTER_FILE if place.is_dir() else place)
    except DistillError as error:
        raise type(error)(error.what, _ACTION) from error


def shapes_of(header: Header) -> dict[str, tuple[int, ...]]:
    """Key to shape."""
    return {name: info.shape for name, info in header.tensors.items()}


def read_json(path: Path) -> Mapping[str, object]:
    """A JSON object from an adapter's folder; errors as of `adapter_header`."""
    try:
        return json_object(read_small(path), str(path), unique_keys=False)
    except DistillError as error:
        raise type(error)(error.what, _ACTION) from error


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """A tensor in its stored dtype, as a private view of the file: no memory is taken until it is used.

    Raises:
        BadDataError: The file became shorter since its header was read.
    """
    from moe_svd_distill.checkpoints.tensors import tensor_view

    with opened(info.file) as descriptor:
        size = os.fstat(descriptor).st_size
        if size < info.offset + info.bytes:
            raise BadDataError(
                f"{info.file} was cut off: found {size} bytes, expected {info.offset + info.bytes} for {info.name}",
                _ACTION,
            )
        return tensor_view(descriptor, info)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal.

    A safetensors file that was cut off while it was written can have its full size and a valid header, with zeros
    behind: only the digest tells it from a complete one.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def scan_values(header: Header, *, digest_checked: bool) -> tuple[str, ...]:
    """Look at every value, one tensor at a time.

    Args:
        header: Of the adapter's file.
        digest_checked: Whether the file is known to be complete; if not, a zero-filled tail is looked for.

    Returns:
        Modules of the pairs that are zero, sorted.

    Raises:
        BadDataError: A tensor has NaN or Inf, is not of a floating-point dtype, or breaks off into zeros; or a head
            that is saved whole is zero.
    """
    zero: set[str] = set()
    broken_off, tail = "", 0  # the tensor that holds the file's last nonzero value, and the zero bytes behind it
    for name, info in header.tensors.items():
        if info.dtype not in FLOATS:
            raise BadDataError(f"{name} is {info.dtype}, expected one of {', '.join(FLOATS)}", _WRITE_AGAIN)
        tensor = read_tensor(info)  # (rank, in) or (out, rank)
        _refuse_not_finite(name, tensor)
        filled = tensor.any(dim=1).nonzero()
        if not len(filled):
            module, side = parse_key(name)
            if side == "whole":
                raise BadDataError(f"{name} is zero throughout: a head of zeros says nothing", _WRITE_AGAIN)
            zero.add(module)
            tail += info.bytes
            continue
        end = int(filled[-1])
        broken_off = name if _breaks_off(tensor, end) else ""
        tail = (tensor.shape[0] - 1 - end) * info.bytes // tensor.shape[0]
    if broken_off and tail >= TAIL_BYTES and not digest_checked:
        raise BadDataError(
            f"{broken_off} breaks off inside a row, and the rest of the file is zero: it was not written to the end",
            "Copy it again, or run the distillation again",
        )
    return tuple(sorted(zero))


def _refuse_not_finite(name: str, tensor: torch.Tensor) -> None:
    from moe_svd_distill.algebra.dtypes import count_not_finite

    if count := count_not_finite(tensor):
        raise BadDataError(f"{name}: {count} of {tensor.numel()} values are NaN or Inf", _WRITE_AGAIN)


def _breaks_off(tensor: torch.Tensor, end: int) -> bool:
    """Whether the values of a matrix stop in the middle of row ``end``, after which there are only zeros.

    Columns that are zero in the earlier rows too, as where a rank was padded with zeros, do not count.
    """
    if end in (0, tensor.shape[0] - 1):
        return False
    stop = int(tensor[end].nonzero()[-1]) + 1
    lost = int(tensor[:end, stop:].any(dim=0).sum())
    return 4 * lost >= tensor.shape[1]
