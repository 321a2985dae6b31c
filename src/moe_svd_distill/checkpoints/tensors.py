"""From bytes of a weights file to a torch tensor, mapped privately and released when its owner is gone.

The only module of the room beside `quantisation.decoding` that imports torch, and only on use. Why not
``safetensors.safe_open``: it maps the whole file once, so that a change made in place to one tensor is seen by
the next read of it, the resident size of the process grows to the size of the model, and a file larger than the memory
cannot be mapped. Why not :mod:`mmap`: it keeps a file descriptor for every mapping, and one layer of a large model has
768 expert tensors. For Linux and macOS.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
import weakref
from functools import cache
from typing import TYPE_CHECKING, Any

from moe_svd_distill.errors import DistillError, shown
from moe_svd_distill.files.dtypes import BYTES_PER_ELEMENT, torch_dtype
from moe_svd_distill.files.header import TensorInfo
from moe_svd_distill.files.reading import fill

if TYPE_CHECKING:
    import torch

MAX_MAPPINGS = 32_768  # half of what Linux grants a process by default; the allocator needs the rest
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0x40  # MAP_NORESERVE: a private view costs no memory until written
_FAILED = ctypes.c_void_p(-1).value

_live = 0
_lock = threading.RLock()  # re-entrant: the garbage collector may release a mapping while another is being made


def tensor_view(descriptor: int, info: TensorInfo) -> torch.Tensor:
    """A CPU tensor on the file's own bytes, mapped privately: nothing is copied before something is written.

    Of a dtype of blocks, as GGUF files have, it is the bytes of each row.

    The bytes are copied where they cannot be mapped (too many mappings alive, or a file system without them), and where
    an element would straddle its alignment, which the format allows.
    """
    import torch

    blocks = info.dtype not in BYTES_PER_ELEMENT
    dtype = torch.uint8 if blocks else torch_dtype(info.dtype)
    if not info.bytes:
        return torch.empty(info.shape, dtype=dtype)
    buffer: Any
    try:
        if info.offset % (1 if blocks else BYTES_PER_ELEMENT[info.dtype]):
            raise OSError(errno.EINVAL, "not aligned")
        buffer = map_bytes(descriptor, info.offset, info.bytes)
    except OSError:
        buffer = _copied(descriptor, info)
    raw = torch.frombuffer(buffer, dtype=torch.uint8)
    return raw.view(*info.shape[:-1], -1) if blocks else raw.view(dtype).view(info.shape)


def _copied(descriptor: int, info: TensorInfo) -> bytearray:
    """The tensor's bytes in memory of their own."""
    try:
        buffer = bytearray(info.bytes)
    except MemoryError as error:
        what = f"tensor {shown(info.name)} of {shown(info.file)} does not fit into memory ({info.bytes} bytes)"
        raise DistillError(what, "Free memory") from error
    fill(descriptor, info.file, info.offset, buffer)
    return buffer


def map_bytes(descriptor: int, offset: int, count: int) -> Any:
    """A writable buffer on ``count`` bytes of a file from ``offset`` on; writes stay in memory, the file never changes.

    Raises:
        OSError: If the operating system refuses, or with ``ENOMEM`` if too many mappings are alive.
    """
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - start + count
    if not _count(+1):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    flags = mmap.MAP_PRIVATE | _NO_RESERVE
    address = _library().mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, start)
    if address is None or address == _FAILED:
        code = ctypes.get_errno()
        _count(-1)
        raise OSError(code, os.strerror(code))
    owner = (ctypes.c_char * count).from_address(address + offset - start)
    weakref.finalize(owner, _release, address, length).atexit = False
    return owner


def _release(address: int, length: int) -> None:
    """The owner is gone, and with it every tensor on the mapping."""
    _library().munmap(address, length)
    _count(-1)


def _count(change: int) -> bool:
    """Keep account of the mappings that are alive; false if there is no room for one more."""
    global _live
    with _lock:
        if change > 0 and _live >= MAX_MAPPINGS:
            return False
        _live += change
        return True


@cache
def _library() -> ctypes.CDLL:
    """The C library with the two calls that are needed."""
    library = ctypes.CDLL(None, use_errno=True)
    address, length, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.restype = address
    library.mmap.argtypes = [address, length, number, number, number, ctypes.c_int64]
    library.munmap.restype = number
    library.munmap.argtypes = [address, length]
    return library
