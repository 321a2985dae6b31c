"""From bytes of a weights file to a torch tensor. The only module of the room that imports torch, and only on use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_svd_distill.checkpoints.faults import shown
from moe_svd_distill.checkpoints.header import BYTES_PER_ELEMENT, TensorInfo
from moe_svd_distill.checkpoints.mapping import map_bytes
from moe_svd_distill.errors import DistillError

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}


def tensor_view(descriptor: int, info: TensorInfo) -> torch.Tensor:
    """A CPU tensor on the file's own bytes, mapped privately: nothing is copied before something is written."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[info.dtype])
    if not info.bytes:
        return torch.empty(info.shape, dtype=dtype)
    try:
        owner = map_bytes(descriptor, info.offset, info.bytes)
    except OSError as error:
        what = f"tensor {shown(info.name)} of {shown(info.file)} cannot be mapped into memory ({error.strerror})"
        raise DistillError(what, "Free memory, or copy the model to a local disk") from error
    raw = torch.frombuffer(owner, dtype=torch.uint8)
    if info.offset % BYTES_PER_ELEMENT[info.dtype]:
        raw = raw.clone()  # allowed by the format, but an element must not straddle its alignment in memory
    return raw.view(dtype).view(info.shape)
