"""Rows of data sets by name, streamed by the optional package `datasets`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moe_svd_distill.errors import BadDataError, MissingInputError, RemoteError, UsageError, reason_of

DATASET_PREFIX = "datasets:"

_OLDEST = 4  # the first major version that runs no code from a data set's repository
_FORM = "Write datasets:NAME[:CONFIG][:SPLIT][#FIELD], for example datasets:org/name::train#text"


@dataclass(frozen=True)
class DatasetName:
    """What `datasets:NAME[@REVISION][:CONFIG][:SPLIT][#FIELD]` names.

    Attributes:
        name: Repository on the hub, or a local folder of data files.
        config: Configuration (subset) or None for the only one.
        split: Which part, `train` unless given.
        field: Field of a row that holds its text or messages, or None to look for it.
        revision: Commit, tag or branch on the hub, or None.
    """

    name: str
    config: str | None = None
    split: str = "train"
    field: str | None = None
    revision: str | None = None


def parse_dataset(source: str) -> DatasetName:
    """Read `datasets:NAME[@REVISION][:CONFIG][:SPLIT][#FIELD]`; an empty place is the default (`NAME::validation`).

    Raises:
        UsageError: It is not of that form.
    """
    rest, _, field = source.removeprefix(DATASET_PREFIX).partition("#")
    places = rest.split(":")
    name, _, revision = places[0].partition("@")
    if not source.startswith(DATASET_PREFIX) or not name or len(places) > 3:
        raise UsageError(f"{source!r} does not name a data set", _FORM)
    config, split = (*places[1:], "", "")[:2]
    return DatasetName(name, config or None, split or "train", field or None, revision or None)


def dataset_rows(source: str, named: DatasetName) -> Iterator[Any]:
    """The rows of a data set in its order.

    Raises:
        MissingInputError: It, its configuration or its split is not there.
        RemoteError: It cannot be fetched.
        BadDataError: It cannot be read without code of its own.
        UsageError: The package `datasets` is missing or too old.
    """
    library = _library(source)
    try:
        yield from library.load_dataset(
            named.name, named.config, split=named.split, revision=named.revision, streaming=True
        )
    except (FileNotFoundError, ValueError) as error:  # no such data set; no such configuration or split
        raise MissingInputError(f"{source} cannot be read ({reason_of(error)})", _FORM) from error
    except (ConnectionError, TimeoutError, OSError) as error:
        raise RemoteError(
            f"{source} cannot be fetched ({reason_of(error)})", "Try again, or name a local file of JSON lines"
        ) from error
    except RuntimeError as error:  # among them: a data set that would need its own code
        raise BadDataError(
            f"{source} cannot be read ({reason_of(error)})", "Save it as JSON lines and name that file"
        ) from error


def _library(source: str) -> Any:
    """Import `datasets`, which is not among what every installation has."""
    install = "Install it with: pip install 'moe-svd-distill[datasets]'"
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(f"{source} needs the package 'datasets' ({error})", install) from error
    version = str(getattr(library, "__version__", "unknown"))
    major = re.match(r"\d+", version)
    if major is None or int(major[0]) < _OLDEST:
        raise UsageError(f"{source} needs the package 'datasets' from version {_OLDEST} on (found {version})", install)
    return library
