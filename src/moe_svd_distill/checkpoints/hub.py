"""Models on the hub: which files make up the model, fetching just those or their headers, pinned to one commit.

The hub's failures are said in the words of this project (not there, not allowed, out of reach), and tokens never show.
"""

from __future__ import annotations

import errno
import glob
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from moe_svd_distill.checkpoints.configuration import CONFIG
from moe_svd_distill.checkpoints.downloads import OnBytes, watched
from moe_svd_distill.checkpoints.shards import find_layout
from moe_svd_distill.checkpoints.survey import raise_faults
from moe_svd_distill.errors import CannotWriteError, DistillError, MissingInputError, RemoteError, reason_of, shown
from moe_svd_distill.files.header import Header, fetched_header, header_of
from moe_svd_distill.files.writing import explain_writing

HUB = "hf"  # the scheme of an address that is read by range
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
SMALL_FILES = re.compile(r"[^/]*\.json|tokenizer[^/]*|[^/]*\.model|[^/]*\.txt|([^/.][^/]*/)*[^/]*\.jinja")
DEFAULT_REVISION = "main"
ASK_THE_OWNER = "Give another revision, or tell the owner of the model"
NOTHING = [CONFIG]  # a pattern for a model without small files: an empty list would mean all files

CONNECTIONS = 8
TRIES = 5
"""In a row, of connections that end before `PROGRESS` bytes came."""
PROGRESS = 1 << 20
SECONDS_BETWEEN = 0.25
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
TOKEN = re.compile(r"hf_[A-Za-z0-9]{4,}|(?<=Bearer )\S+|(?<=://)[^/@\s]+(?=@)")
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
MAX_CAUSES = 8
MAKE_ROOM = "Make room, or point HF_HOME to another disk"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubModel:
    """A model on the hub, as the user names it."""

    repo: str
    revision: str = DEFAULT_REVISION

    def __str__(self) -> str:
        return self.repo if self.revision == DEFAULT_REVISION else f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class Snapshot:
    """A model on the hub at one commit, its small files in the local cache; a `Source` of the rest.

    Attributes:
        model: As the user names it.
        revision: The commit.
        folder: Where its small files are.
        sizes: All its files on the hub to their bytes.
        unreachable: Why the hub could not be asked, where it could not; the cache then holds all that there is.
    """

    model: HubModel
    revision: str
    folder: Path = Path()
    sizes: Mapping[str, int] = field(default_factory=dict)
    unreachable: RemoteError | None = None

    @property
    def cache_note(self) -> str:
        """That the hub was not asked, and which commit of its cache is read; empty where it was."""
        if self.unreachable is None:
            return ""
        return f"{self.unreachable.what}; commit {self.revision} of its cache is read"

    @property
    def address(self) -> str:
        """As the user gives it to have it read by range."""
        return f"{HUB}://{self.model}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all files, sorted."""
        return tuple(sorted(self.sizes))

    def small_file(self, name: str) -> bytes:
        """A whole file, from the hub's cache."""
        return (self.folder / name).read_bytes()

    def read(self, name: str, begin: int, end: int) -> tuple[bytes, int]:
        """The bytes from ``begin`` to ``end`` of a file, as far as it has them, and the file's size.

        Where the hub is busy it is asked again, later each time; where a connection ends early, for the rest.

        Raises:
            RemoteError: It cannot be reached, refuses, or does not send parts of files.
            MissingInputError: The file is not there.
        """
        body, size, tries = bytearray(), end, 0
        while not body or len(body) < min(end, size) - begin:
            already = len(body)
            size, cut = self._append(body, name, begin + already, end)
            if cut is None and len(body) == min(end, size) - begin:
                break
            tries = tries + 1 if len(body) - already < PROGRESS else 0
            if tries == TRIES or len(body) > min(end, size) - begin:
                expected = min(end, size) - begin
                what = f"the hub sent {len(body)} bytes of {shown(name)} of {self.model} (expected {expected})"
                raise RemoteError(what, "Try again later") from cut
            time.sleep(tries * SECONDS_BETWEEN)
        return bytes(body), size

    def _append(self, body: bytearray, name: str, begin: int, end: int) -> tuple[int, Exception | None]:
        """Append what comes of a range; the file's size, and what ended the connection early."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        url = hf_hub_url(self.model.repo, name, revision=self.revision)
        headers = build_hf_headers()
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with (
            hub_errors(self.model),
            http_stream_backoff("GET", url, headers=headers, follow_redirects=True) as response,
        ):
            hf_raise_for_status(response)
            found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if response.status_code != 206 or found is None or int(found[1]) != begin:
                # A server that does not know ranges would send the whole file: leave before it does.
                raise RemoteError(
                    f"the hub does not send a part of {shown(name)} of {self.model} (status {response.status_code})",
                    "Download the model and give its folder",
                )
            size = int(found[3])
            left = min(end, size) - begin
            try:
                for piece in response.iter_bytes():
                    body += piece
                    left -= len(piece)
                    if left < 0:
                        break
            except Exception as cut:  # of whichever library the hub's own stands on
                return size, cut
        return size, None


@cache
def say_once(line: str) -> None:
    """Log a line about a model that whoever opens it should read, the first time that it is said in this process."""
    _LOG.warning("note: %s", line)


def parse_hub_id(text: str) -> HubModel | None:
    """``organisation/name`` or ``organisation/name@revision``; ``None`` for anything else."""
    match = HUB_ID.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"]:
        return None
    return HubModel(match["repo"], match["revision"] or DEFAULT_REVISION)


def fetch_small(model: HubModel) -> Snapshot:
    """Fetch configuration, index and tokenizer. If the hub is out of reach, the cache serves."""
    from huggingface_hub import HfApi, snapshot_download

    def files_at(revision: str) -> tuple[str, dict[str, int]]:
        info = HfApi().model_info(model.repo, revision=revision, files_metadata=True)
        return str(info.sha), {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}

    try:
        with hub_errors(model):
            commit, sizes = files_at(model.revision)
            patterns = [glob.escape(name) for name in sizes if SMALL_FILES.fullmatch(name)]
            # By branch and not by commit: the cache then remembers, for a run without the network, what the branch was.
            folder = Path(snapshot_download(model.repo, revision=model.revision, allow_patterns=patterns or NOTHING))
            if folder.name != commit:  # the branch moved between the two questions
                commit, sizes = files_at(folder.name)
    except RemoteError as unreachable:
        return _cached(model, unreachable)
    return Snapshot(model, commit, folder, sizes)


def fetch_weights(snapshot: Snapshot, on_bytes: OnBytes | None = None) -> None:
    """Fetch the weights files beside the small ones: those that the index names, and no other formats or copies."""
    from huggingface_hub import snapshot_download

    model = snapshot.model
    layout = find_layout(snapshot.folder, snapshot.names)
    absent = [name for name in layout.files if name not in snapshot.names]
    gone = [
        MissingInputError(f"the weights file {shown(name)} of {model} is missing", ASK_THE_OWNER) for name in absent
    ]
    raise_faults([*layout.faults, *gone])
    needed = sum(snapshot.sizes[name] for name in layout.files if not (snapshot.folder / name).exists())
    if needed > (free := shutil.disk_usage(snapshot.folder).free):
        raise CannotWriteError(
            f"{model} takes {needed / 1e9:,.1f} GB and the disk of the hub's cache has {free / 1e9:,.1f} GB free",
            f"Make room, point HF_HOME to another disk, or read it by range: {snapshot.address}",
        )
    patterns = [glob.escape(name) for name in layout.files]
    sizes = {name: snapshot.sizes[name] for name in layout.files}
    with hub_errors(model), watched(snapshot.folder, sizes, on_bytes):
        snapshot_download(model.repo, revision=snapshot.revision, allow_patterns=patterns)


def _cached(model: HubModel, unreachable: RemoteError) -> Snapshot:
    """The snapshot that an earlier run has left in the cache, or the reason why the hub could not be asked."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.repo, CONFIG, revision=model.revision)
    if not isinstance(found, str):
        raise unreachable
    folder = Path(found).parent
    return Snapshot(model, folder.name, folder, unreachable=unreachable)


def fetch_headers(snapshot: Snapshot, files: Sequence[str]) -> dict[str, Header | DistillError]:
    """Each file's header, or what is wrong with it. A hub that cannot be reached is raised at once."""

    def one(name: str) -> Header | DistillError:
        path = snapshot.folder / name
        try:
            raw, size = fetched_header(partial(snapshot.read, name), path)
            return header_of(raw, path, size)
        except RemoteError:
            raise
        except DistillError as fault:
            return fault

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return dict(zip(files, pool.map(one, files), strict=True))


@contextmanager
def hub_errors(model: object, token: str | None = None) -> Iterator[None]:
    """Translate whatever the hub's library raises."""
    try:
        yield
    except DistillError:
        raise
    except Exception as error:
        raise translate(error, str(model), token) from error


def redact(text: str, token: str | None = None) -> str:
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
    refused = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)
    if full := explain_writing(error, f"{model} into the hub's cache", opening=refused, action=MAKE_ROOM):
        return full
    reason = redact(reason_of(error), token)[:200]
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
