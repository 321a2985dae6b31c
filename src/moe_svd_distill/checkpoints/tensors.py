"""From bytes of a weights file to a torch tensor. The only module of the room that imports torch, and only on use."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from moe_svd_distill.checkpoints.mapping import map_bytes
from moe_svd_distill.errors import DistillError, shown
from moe_svd_distill.files.dtypes import BYTES_PER_ELEMENT, torch_dtype
from moe_svd_distill.files.header import TensorInfo
from moe_svd_distill.files.reading import fill

if TYPE_CHECKING:
    import torch


def tensor_view(descriptor: int, info: TensorInfo) -> torch.Tensor:
    """A CPU tensor on the file's own bytes, mapped privately: nothing is copied before something is written.

    The bytes are copied where they cannot be mapped (too many mappings alive, or a file system without them), and where
    an element would straddle its alignment, which the format allows.
    """
    import torch

    dtype = torch_dtype(info.dtype)
    if not info.bytes:
        return torch.empty(info.shape, dtype=dtype)
    buffer: Any
    try:
        if info.offset % BYTES_PER_ELEMENT[info.dtype]:
            raise OSError(errno.EINVAL, "not aligned")
        buffer = map_bytes(descriptor, info.offset, info.bytes)
    except OSError:
        buffer = _copied(descriptor, info)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(info.shape)


def _copied(descriptor: int, info: TensorInfo) -> bytearray:
    """The tensor's bytes in memory of their own."""
    try:
        buffer = bytearray(info.bytes)
    except MemoryError as error:
        what = f"tensor {shown(info.name)} of {shown(info.file)} does not fit into memory ({info.bytes} bytes)"
        raise DistillError(what, "Free memory") from error
    fill(descriptor, info.file, info.offset, buffer)
    return buffer
