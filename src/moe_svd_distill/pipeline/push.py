"""Push: an adapter's own files to a repository of the hub, without what tells of this machine or of private text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from moe_svd_distill.adapter.adapter_file import read_json, sha256_of
from moe_svd_distill.checkpoints.hub import LOG_IN, hub_errors, parse_hub_id
from moe_svd_distill.errors import BadDataError, MissingInputError, RemoteError, UsageError
from moe_svd_distill.files.names import (
    ADAPTER_FILE,
    CARD_FILE,
    CONFIGURATION_FILE,
    CURVE_FILE,
    EVALUATION_FILE,
    GGUF_ADAPTER_FILE,
    RECORD_FILE,
)
from moe_svd_distill.files.writing import json_text
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.record import RunRecord

_WEIGHTS = (ADAPTER_FILE, GGUF_ADAPTER_FILE)
_FACTS = (CONFIGURATION_FILE, RECORD_FILE, EVALUATION_FILE, CURVE_FILE)
_PRIVATE = {EVALUATION_FILE: ("continuations", "kept_states")}  # passages of a text that may be nobody else's
_PATH = re.compile(r"(?<![\w.:/])/(?:[^/\s\"']+/)+([^/\s\"']+)")


@dataclass(frozen=True)
class PushedFile:
    """A file to be sent: its name in the repository, and what is in it, or where it lies."""

    name: str
    content: bytes | Path

    @property
    def size(self) -> int:
        """Bytes."""
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)


@dataclass(frozen=True)
class PushReport:
    """What was sent, or would be.

    Attributes:
        repo: organisation/name.
        files: Name to bytes.
        left: What else lies in the folder and stays here.
        url: Of the repository; None where nothing was sent.
        private: Whether the repository is; None where nobody asked.
    """

    repo: str
    files: Mapping[str, int]
    left: tuple[str, ...]
    url: str | None = None
    private: bool | None = None


def push(
    adapter: Path | str, repo: str, *, public: bool = False, dry_run: bool = False, token: str | None = None
) -> PushReport:
    """Send a finished adapter to the hub; what has arrived already is not sent again.

    Paths of this machine in its JSON files are cut to their last part, and the passages of held-out text that the
    models went on with stay here, and so does report.html, which shows them.

    Args:
        adapter: Its folder.
        repo: organisation/name; made if it is not there.
        public: Whether all may see it.
        dry_run: Only say what would be sent; the hub is not asked.
        token: Of the hub; default: the one of `hf auth login` or of HF_TOKEN.

    Raises:
        MissingInputError: The folder holds no adapter.
        BadDataError: The adapter is not the one of its run.json.
        UsageError: The name is none, or the repository is public and is to be private.
        RemoteError: There is no token, or the hub refuses or cannot be reached.
    """
    folder, model = Path(adapter), parse_hub_id(repo)
    if model is None or "@" in repo:
        raise UsageError(f"{repo!r} is not the name of a repository", "Give ORGANISATION/NAME")
    files = _files(folder)
    sent, sizes = {file.name for file in files}, {file.name: file.size for file in files}
    left = tuple(sorted(f"{p.name}/" if p.is_dir() else p.name for p in folder.iterdir() if p.name not in sent))
    report = PushReport(repo, sizes, left)
    return report if dry_run else _send(report, files, public, token)


def _send(report: PushReport, files: list[PushedFile], public: bool, given: str | None) -> PushReport:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    token, repo = given or get_token(), report.repo
    if not token:
        raise RemoteError(f"there is no token to write {repo} with", f"To get access, {LOG_IN}")
    api = HfApi(token=token)
    with hub_errors(repo, token):
        try:
            url = api.create_repo(repo, private=not public, exist_ok=True)
            private = bool(api.model_info(repo).private)
            if not private and not public:
                raise UsageError(
                    f"the repository {repo} is there and public (expected a private one)",
                    "Add --public, or choose another name",
                )
            added = [CommitOperationAdd(file.name, file.content) for file in files]
            api.create_commit(repo, added, commit_message="Adapter by MoE-SVD-Distill")
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            what = f"the hub refuses to let this token write {repo} (status {error.response.status_code})"
            raise RemoteError(
                what, "Give a token with the right to write there: `hf auth login` or HF_TOKEN"
            ) from error
    return PushReport(repo, report.files, report.left, str(url), private)


def _files(folder: Path) -> list[PushedFile]:
    if not (folder / CONFIGURATION_FILE).is_file() or not any((folder / name).is_file() for name in _WEIGHTS):
        raise MissingInputError(f"{folder} holds no adapter (no {CONFIGURATION_FILE})", "Give an adapter's folder")
    record = RunRecord.in_folder(folder)
    weights = folder / ADAPTER_FILE
    if record.adapter_sha256 and weights.is_file() and (found := sha256_of(weights)) != record.adapter_sha256:
        raise BadDataError(
            f"{weights} is not the adapter of its {RECORD_FILE} (sha256 {found[:12]}…, "
            f"expected {record.adapter_sha256[:12]}…)",
            "Run distill again",
        )
    return list(_contents(folder, record))


def _contents(folder: Path, record: RunRecord) -> Iterator[PushedFile]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            yield PushedFile(name, folder / name)
    for name in _FACTS:
        if (folder / name).is_file():
            facts = {key: value for key, value in read_json(folder / name).items() if key not in _PRIVATE.get(name, ())}
            yield PushedFile(name, json_text(without_paths(facts)).encode())
    if record.content:
        yield PushedFile(CARD_FILE, adapter_card(record).encode())
    elif (folder / CARD_FILE).is_file():
        yield PushedFile(CARD_FILE, folder / CARD_FILE)


def without_paths(value: Any) -> Any:
    """JSON with every path of a machine cut to its last part, also within sentences."""
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    return PurePath(value).name if PurePath(value).is_absolute() else _PATH.sub(r"\1", value)
