"""The digest that tells a complete adapter from one that only opens.

A safetensors file that was cut off while it was written can have its full size and a valid header, with zeros behind.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
