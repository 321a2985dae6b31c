"""Every failure a user can meet, with the exit code that other programs rely on.

An error is one line: what is wrong, where (found X, expected Y), and one thing to do. The codes follow ``sysexits.h``
where it has a fitting one.
"""

from __future__ import annotations

import re
import reprlib
from pathlib import PurePath

SHOWN_CHARACTERS = 120
SHOWN_PATH_CHARACTERS = 400
SHOWN_REASON_CHARACTERS = 300
# Libraries advise to let a model's own code run; whoever reads that here may follow it.
_WANTS_CODE = re.compile(r"[^.(]*\btrust_remote_code\b[^.)]*")
_NEVER = " it wants to run code of the model, which is never done here"


class DistillError(Exception):
    """A failure that is explained to the user in one line.

    Args:
        what: What is wrong and where, with found and expected values.
        action: The one thing the user can do next.
    """

    exit_code = 1

    def __init__(self, what: str, action: str) -> None:
        self.what = _WANTS_CODE.sub(_NEVER, " ".join(what.split())).rstrip(".")
        self.action = " ".join(action.split()).rstrip(".")
        super().__init__(f"{self.what}. {self.action}{'' if self.action.endswith('?') else '.'}")

    def __reduce__(self) -> tuple[type[DistillError], tuple[str, str], dict[str, object]]:
        """Survive the trip from a worker process to its parent, notes included."""
        return (type(self), (self.what, self.action), self.__dict__)


class UsageError(DistillError):
    """The command or the recipe asks for something that does not exist."""

    exit_code = 2


class BadDataError(DistillError):
    """An input file is damaged, inconsistent, or not what it claims to be."""

    exit_code = 65


class MissingInputError(DistillError):
    """A model, tensor file, text or adapter that was named is not there."""

    exit_code = 66


class RemoteError(DistillError):
    """The hub cannot be reached or refuses."""

    exit_code = 69


class CannotWriteError(DistillError):
    """The output cannot be written: disk full, no permission, folder in use."""

    exit_code = 73


class IncompleteError(DistillError):
    """Some units of work are not done; the same command, run again, goes on where this one stopped."""

    exit_code = 75


class IncompatiblePairError(DistillError):
    """Teacher and student cannot be distilled into one another."""

    exit_code = 78


class NothingToTransferError(DistillError):
    """Every delta is exactly zero: the teacher already equals the student, and the adapter would do nothing."""

    exit_code = 79


def reason_of(error: BaseException) -> str:
    """What another library's error says, on one line: its first line, and those behind it that a colon announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    count = next((place for place, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:count])[:SHOWN_REASON_CHARACTERS]


def shown(value: object) -> str:
    """A name, path or value from a file, safe to print: in quotes, escaped, the middle of a long one left out."""
    if isinstance(value, PurePath):
        return _shortened(repr(str(value)), SHOWN_PATH_CHARACTERS)
    return _shortened(repr(value) if isinstance(value, str) else reprlib.repr(value), SHOWN_CHARACTERS)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}"
