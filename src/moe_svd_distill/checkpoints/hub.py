"""Models on the hub: which files make up the model, and fetching just those, pinned to one commit."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from moe_svd_distill.checkpoints.faults import raise_faults
from moe_svd_distill.checkpoints.hub_errors import hub_errors
from moe_svd_distill.checkpoints.layout import CONFIG, find_layout
from moe_svd_distill.errors import MissingInputError, RemoteError, shown

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
SMALL_FILES = re.compile(r"[^/]*\.json|tokenizer[^/]*|[^/]*\.model|[^/]*\.txt|([^/.][^/]*/)*[^/]*\.jinja")
DEFAULT_REVISION = "main"
ASK_THE_OWNER = "Give another revision, or tell the owner of the model"
NOTHING = [CONFIG]  # a pattern for a model without small files: an empty list would mean all files


@dataclass(frozen=True)
class HubModel:
    """A model on the hub, as the user names it."""

    repo: str
    revision: str = DEFAULT_REVISION

    def __str__(self) -> str:
        return self.repo if self.revision == DEFAULT_REVISION else f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class Snapshot:
    """A model's small files in the local cache, its commit, and the names of all its files on the hub.

    Where the hub could not be asked, ``unreachable`` says why; the cache then holds all that there is.
    """

    folder: Path
    commit: str
    names: tuple[str, ...] = ()
    unreachable: RemoteError | None = None


def parse_hub_id(text: str) -> HubModel | None:
    """``organisation/name`` or ``organisation/name@revision``; ``None`` for anything else."""
    match = HUB_ID.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"]:
        return None
    return HubModel(match["repo"], match["revision"] or DEFAULT_REVISION)


def fetch_small(model: HubModel, token: str | None) -> Snapshot:
    """Fetch configuration, index and tokenizer. If the hub is out of reach, the cache serves."""
    from huggingface_hub import HfApi, snapshot_download

    def names_at(revision: str) -> tuple[str, tuple[str, ...]]:
        info = HfApi(token=token).model_info(model.repo, revision=revision)
        return str(info.sha), tuple(sorted(sibling.rfilename for sibling in info.siblings or []))

    try:
        with hub_errors(model, token):
            commit, names = names_at(model.revision)
            patterns = [glob.escape(name) for name in names if SMALL_FILES.fullmatch(name)]
            # By branch and not by commit: the cache then remembers, for a run without the network, what the branch was.
            folder = Path(
                snapshot_download(model.repo, revision=model.revision, token=token, allow_patterns=patterns or NOTHING)
            )
            if folder.name != commit:  # the branch moved between the two questions
                commit, names = names_at(folder.name)
    except RemoteError as unreachable:
        return _cached(model, unreachable)
    return Snapshot(folder, commit, names)


def fetch_weights(model: HubModel, snapshot: Snapshot, token: str | None) -> None:
    """Fetch the weights files beside the small ones: those that the index names, and no other formats or copies."""
    from huggingface_hub import snapshot_download

    layout = find_layout(snapshot.folder, snapshot.names)
    absent = [name for name in layout.files if name not in snapshot.names]
    gone = [
        MissingInputError(f"the weights file {shown(name)} of {model} is missing", ASK_THE_OWNER) for name in absent
    ]
    raise_faults([*layout.faults, *gone])
    patterns = [glob.escape(name) for name in layout.files]
    with hub_errors(model, token):
        snapshot_download(model.repo, revision=snapshot.commit, token=token, allow_patterns=patterns)


def _cached(model: HubModel, unreachable: RemoteError) -> Snapshot:
    """The snapshot that an earlier run has left in the cache, or the reason why the hub could not be asked."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.repo, CONFIG, revision=model.revision)
    if not isinstance(found, str):
        raise unreachable
    folder = Path(found).parent
    return Snapshot(folder, folder.name, unreachable=unreachable)
