"""The files of an adapter's folder, and its tensors one at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.checkpoints import TensorInfo
from moe_svd_distill.errors import BadDataError, DistillError
from moe_svd_distill.files.header import Header, read_header
from moe_svd_distill.files.names import ADAPTER_FILE
from moe_svd_distill.files.reading import json_object, opened, read_small

if TYPE_CHECKING:
    import torch

_ACTION = "Write or copy the adapter again"


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an adapter's folder.

    Raises:
        MissingInputError: There is no such file.
        BadDataError: It is not a JSON object.
    """
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
