"""The hub's failures in the words of this project: not there, not allowed, or out of reach. Tokens never show."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from moe_svd_distill.errors import CannotWriteError, DistillError, MissingInputError, RemoteError

TOKEN = re.compile(r"hf_[A-Za-z0-9]{4,}|(?<=Bearer )\S+|(?<=://)[^/@\s]+(?=@)")
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
MAX_CAUSES = 8
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def hub_errors(model: object, token: str | None) -> Iterator[None]:
    """Translate whatever the hub's library raises."""
    try:
        yield
    except DistillError:
        raise
    except Exception as error:
        raise translate(error, str(model), token) from error


def redact(text: str, token: str | None) -> str:
    """The text without anything that looks like a secret."""
    return TOKEN.sub("***", text.replace(token, "***") if token else text)


def translate(error: Exception, model: str, token: str | None) -> DistillError:
    """One error of the hub's library, explained."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return MissingInputError(f"the hub model {model} is gated", f"Accept its terms on the hub, and {LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return MissingInputError(f"the hub model {model} has no such revision", "Check the part after '@'")
    if isinstance(error, errors.RepositoryNotFoundError):
        what = f"{model} is neither a folder here nor a model that the hub shows you"
        return MissingInputError(what, f"Check the name; if the model is private, {LOG_IN}")
    if isinstance(error, errors.HFValidationError):
        return MissingInputError(f"{model} is not a possible name of a hub model", "Give organisation/name@revision")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return MissingInputError(f"a file of the hub model {model} is not there", "Try again, or give another revision")
    status = _status(error)
    if status in (401, 403):
        return RemoteError(f"the hub refuses {model} (status {status})", f"To get access, {LOG_IN}")
    if status is not None:
        return RemoteError(f"the hub answers with status {status} for {model}", "Try again later")
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        what = f"{model} cannot be stored in the hub's cache: {error.strerror}"
        return CannotWriteError(what, "Make room, or point HF_HOME to another disk")
    reason = redact(str(error).strip().split("\n")[0], token)[:200]
    return RemoteError(
        f"the hub cannot be reached for {model} ({type(error).__name__}: {reason})",
        "Check the network, or give a local folder",
    )


def _status(error: BaseException | None) -> int | None:
    """The status that the hub answered with, also where the library wraps it into an error about the cache."""
    for _ in range(MAX_CAUSES):
        if error is None:
            return None
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None
