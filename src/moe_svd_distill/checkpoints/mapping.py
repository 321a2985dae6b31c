"""Mapping a piece of a file into memory: private to its owner, released when its owner is gone (Linux and macOS).

Why not ``safetensors.safe_open``: it maps the whole file once, so that a change made in place to one tensor is seen by
the next read of it, the resident size of the process grows to the size of the model, and a file larger than the memory
cannot be mapped. Why not :mod:`mmap`: it keeps a file descriptor for every mapping, and one layer of a large model has
768 expert tensors.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from typing import Any

_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0x40  # MAP_NORESERVE: a private view costs no memory until written
_FAILED = ctypes.c_void_p(-1).value


def map_bytes(descriptor: int, offset: int, count: int) -> Any:
    """A writable buffer on ``count`` bytes of a file from ``offset`` on; writes stay in memory, the file never changes.

    Raises:
        OSError: If the operating system refuses.
    """
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    lead = offset - start
    library = _library()
    ctypes.set_errno(0)
    flags = mmap.MAP_PRIVATE | _NO_RESERVE
    address = library.mmap(None, lead + count, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, start)
    if address is None or address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    owner = (ctypes.c_char * count).from_address(address + lead)
    weakref.finalize(owner, library.munmap, address, lead + count).atexit = False
    return owner


_loaded: ctypes.CDLL | None = None


def _library() -> ctypes.CDLL:
    """The C library with the two calls that are needed."""
    global _loaded
    if _loaded is None:
        library = ctypes.CDLL(None, use_errno=True)
        whole, length, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        library.mmap.restype = ctypes.c_void_p
        library.mmap.argtypes = [whole, length, number, number, number, ctypes.c_int64]
        library.munmap.restype = number
        library.munmap.argtypes = [whole, length]
        _loaded = library
    return _loaded
