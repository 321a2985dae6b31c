"""The names that safetensors gives types, what they are in torch, and the bytes of a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# In the library's order: wider and later types come first in a file, so that every tensor is aligned. The packed types
# (F4, F6) and complex numbers are left out.
_TABLE = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F32": (4, "float32"),
    "F64": (8, "float64"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
}
BYTES_PER_ELEMENT = {code: size for code, (size, _) in _TABLE.items()}
TORCH_NAMES = {code: name for code, (_, name) in _TABLE.items()}
RANKS = {code: rank for rank, code in enumerate(_TABLE)}
FLOATS = ("F64", "F32", "F16", "BF16")
"""What models and adapters compute in; narrower ones are codes that need their scales."""

_CODES = {f"torch.{name}": code for code, name in TORCH_NAMES.items()}


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a name."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[code])
    return dtype


def dtype_code(dtype: torch.dtype) -> str:
    """The name of a torch dtype.

    Raises:
        TypeError: There is none for it.
    """
    try:
        return _CODES[str(dtype)]
    except KeyError:
        raise TypeError(f"a part cannot hold tensors of {dtype}") from None


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy if it is contiguous; little-endian on all supported machines."""
    import torch

    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
