"""Where a remote model lies: the hub (``hf://``), or any file system that fsspec knows (``s3://``, ``gs://``, …)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from moe_svd_distill.checkpoints.hub import HUB, Snapshot, fetch_small, parse_hub_id, redact
from moe_svd_distill.errors import (
    BadDataError,
    DistillError,
    MissingInputError,
    RemoteError,
    UsageError,
    reason_of,
    shown,
)
from moe_svd_distill.files.reading import FETCH_AGAIN, MAX_JSON_BYTES

_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+]*)://(?P<place>.+)", re.ASCII)
_LOCAL = ("file", "local")


class StoreSource:
    """A folder of an object store, read through fsspec.

    Attributes:
        address: As the user gave it, without secrets.
        revision: A digest of what the store says of the files.
        names: All of its files.
    """

    def __init__(self, address: str, revision: str | None = None) -> None:
        """List the files.

        Args:
            address: Such as ``s3://bucket/folder``.
            revision: What the files have to be still; None takes them as they are.

        Raises:
            MissingInputError: Nothing is there, or the file system's package is not installed.
            RemoteError: The store cannot be reached or refuses.
            BadDataError: The files are others than those of the revision.
        """
        self.address = redact(address)
        self._files, self._root = _file_system(address)
        with _store_errors(self.address):
            found: dict[str, dict[str, Any]] = self._files.find(self._root, detail=True)
        if not found:
            raise MissingInputError(f"there is no file at {shown(self.address)}", "Check the address")
        begin = len(self._root.rstrip("/")) + 1
        self._details = {path[begin:]: detail for path, detail in sorted(found.items())}
        self.names = tuple(self._details)
        self.revision = _digest_of(self._details)
        if revision not in (None, self.revision):
            raise BadDataError(
                f"the files at {shown(self.address)} are not those that were opened any more", "Start the run again"
            )

    def small_file(self, name: str) -> bytes:
        """A whole file, refused where it is a large one."""
        found, size = self.read(name, 0, MAX_JSON_BYTES)
        if size > MAX_JSON_BYTES:
            raise BadDataError(
                f"{shown(name)} of {shown(self.address)} has {size} bytes (expected at most {MAX_JSON_BYTES})",
                FETCH_AGAIN,
            )
        return found

    def read(self, name: str, begin: int, end: int) -> tuple[bytes, int]:
        """The bytes from ``begin`` to ``end`` of a file, as far as it has them, and the file's size.

        Raises:
            RemoteError: The store cannot be reached, refuses, or sends something else.
            MissingInputError: The file is not there.
        """
        size = int(self._details[name]["size"])
        end = min(end, size)
        with _store_errors(self.address):
            found = bytes(self._files.cat_file(f"{self._root.rstrip('/')}/{name}", start=begin, end=end))
        if len(found) != end - begin:
            raise RemoteError(
                f"{shown(self.address)} sent {len(found)} bytes of {shown(name)}, expected {end - begin}",
                "Copy the model to this machine and give its folder",
            )
        return found, size


Source: TypeAlias = StoreSource | Snapshot
"""A model somewhere else: its address, revision and names, `small_file` and `read`."""


def is_address(text: str) -> bool:
    """Whether this is an address with a scheme, such as ``hf://organisation/name``."""
    return _ADDRESS.fullmatch(text) is not None


def open_source(address: str, revision: str | None = None) -> Source:
    """What an address names.

    Args:
        address: ``hf://organisation/name@revision``, or a folder of a store, ``s3://bucket/folder``.
        revision: What an earlier opening found; None for what there is now.

    Raises:
        MissingInputError: There is no such model, or a package for such addresses is not installed.
        RemoteError: It cannot be reached or refuses.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise UsageError(f"{shown(address)} is no address of a model", "Give hf://organisation/name")
    if found["scheme"] != HUB:
        return StoreSource(address, revision)
    model = parse_hub_id(found["place"])
    if model is None:
        raise MissingInputError(
            f"{shown(address)} is not a possible name of a hub model", f"Give {HUB}://organisation/name@revision"
        )
    if revision is not None:
        return Snapshot(model, revision)
    return fetch_small(model)


def _file_system(address: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    scheme = address.partition("://")[0]
    if scheme in _LOCAL:
        raise UsageError(f"{shown(address)} is on this machine", "Give the folder without the scheme")
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise MissingInputError(
            f"{scheme}:// needs a package that is not installed ({error})",
            "Install moe-svd-distill with the extra 'stores', or the package named",
        ) from error
    except ValueError as error:
        raise UsageError(f"{shown(redact(address))} cannot be read ({error})", "Give hf:// or s3://") from error


@contextmanager
def _store_errors(address: str) -> Iterator[None]:
    """Translate whatever a store's library raises."""
    try:
        yield
    except DistillError:
        raise
    except FileNotFoundError as error:
        raise MissingInputError(f"there is no model at {shown(address)}", "Check the address") from error
    except Exception as error:
        raise RemoteError(
            f"{shown(address)} cannot be read ({type(error).__name__}: {redact(reason_of(error))[:200]})",
            "Check the network and the store's credentials, or give a local folder",
        ) from error


def _digest_of(details: Mapping[str, Mapping[str, object]]) -> str:
    """Of the names, sizes and whatever the store says changes with the contents."""
    known = ("ETag", "etag", "md5Hash", "crc32c", "LastModified", "updated", "mtime", "created")
    lines = [
        f"{name} {detail['size']} {[str(detail.get(key, '')) for key in known]}" for name, detail in details.items()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]
