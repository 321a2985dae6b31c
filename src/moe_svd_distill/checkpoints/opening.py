"""From what the user typed to a checked checkpoint."""

from __future__ import annotations

from pathlib import Path

from moe_svd_distill.checkpoints.checkpoint import Checkpoint
from moe_svd_distill.checkpoints.configuration import read_config
from moe_svd_distill.checkpoints.downloads import OnBytes
from moe_svd_distill.checkpoints.hub import fetch_headers, fetch_small, fetch_weights, parse_hub_id, redact
from moe_svd_distill.checkpoints.llama_cpp.folder import file_behind
from moe_svd_distill.checkpoints.notes import say_once
from moe_svd_distill.checkpoints.quantisation.claims import USE_PLAIN, declared_quantisation
from moe_svd_distill.checkpoints.remote.folder import keep
from moe_svd_distill.checkpoints.remote.source import HUB, is_address
from moe_svd_distill.checkpoints.shards import GGUF
from moe_svd_distill.checkpoints.survey import raise_faults, survey
from moe_svd_distill.errors import BadDataError, MissingInputError, RemoteError, UsageError, shown
from moe_svd_distill.files.reading import explain


def open_checkpoint(
    model: str | Path,
    *,
    token: str | None = None,
    as_stored: bool = False,
    headers_only: bool = False,
    remote_bytes: int | None = None,
    on_bytes: OnBytes | None = None,
) -> Checkpoint:
    """Open a model: a folder, a GGUF file (the first of several), a hub id or an address.

    An address (``hf://organisation/name``, ``s3://bucket/folder``) is read by range: tensors are fetched when they are
    read first, and the whole model is never on this machine.

    Every header is read and checked before this returns; all faults are raised in one error, whose ``faults`` lists
    them. A hub model is downloaded into the hub's cache first, and refused before that if its small files say enough.
    A quantised model is a mapping of its dequantised weights; a quantisation that is not known is refused.
    What should be known of the model (`Checkpoint.notes`), and that the hub was not reached, is logged.

    Args:
        model: What the user typed.
        token: The hub's access token; by default the one that the user is logged in with.
        as_stored: Show quantised weights as the codes and companions that they are stored as, for looking at them.
        headers_only: Of a hub model, fetch the small files and the headers only. Tensors cannot be read then.
        on_bytes: Told how far a download is.
        remote_bytes: What fetched tensors of an address may take on the disk; None for what was said before, or all.
    """
    source = str(model)
    if is_address(source):
        place: Path | None
        place, cache_note = keep(source, remote_bytes)
        source = redact(source.removeprefix(f"{HUB}://"), token)
    else:
        place, cache_note = _local_place(model), ""
    if place:
        checkpoint = Checkpoint(place, source, as_stored=as_stored)
        checkpoint.cache_note = cache_note
    else:
        checkpoint = _from_hub(source, token, as_stored, headers_only, on_bytes)
    checkpoint.check()
    for note in checkpoint.notes:
        say_once(note if note == checkpoint.cache_note else f"{source}: {note}")
    return checkpoint


def _local_place(model: str | Path) -> Path | None:
    """The folder or GGUF file that is meant, if there is one."""
    if not str(model):
        raise MissingInputError("the name of the model is empty", "Give the folder of a model, or a hub id")
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return file_behind(path.absolute()) or path.absolute()
        is_file = path.exists()
        if is_file and path.suffix.lower() == GGUF:
            return path.absolute()
    except OSError as error:
        if isinstance(error, PermissionError):
            raise explain(error, Path(model)) from error
        is_file = False  # such as a name that is too long for this file system
    except RuntimeError:  # "~name" without such a user
        is_file = False
    if is_file:
        raise MissingInputError(f"{shown(str(model))} is a file", "Give the folder that holds the model")
    is_gguf = str(model).lower().endswith(GGUF)
    if isinstance(model, Path) or is_gguf:
        raise MissingInputError(f"the {'file' if is_gguf else 'folder'} {shown(model)} is not there", "Check the path")
    return None


def _from_hub(
    source: str, token: str | None, as_stored: bool, headers_only: bool, on_bytes: OnBytes | None
) -> Checkpoint:
    """The model in the hub's cache: all of it, or the small files with the headers of the weights."""
    model = parse_hub_id(source)
    if model is None:
        what = f"{shown(source)} is neither a folder nor the name of a hub model"
        raise MissingInputError(what, "Give the folder of a model, or organisation/name@revision")
    snapshot = fetch_small(model, token)
    if not as_stored:
        declared_quantisation(read_config(snapshot.folder), source)  # refused before anything large is downloaded
    if snapshot.unreachable is not None:
        checkpoint = _from_cache(snapshot.folder, source, snapshot.unreachable, as_stored)
        checkpoint.cache_note = snapshot.cache_note
        return checkpoint
    if headers_only:
        found = survey(
            snapshot.folder,
            snapshot.names,
            lambda files: fetch_headers(model, snapshot, files, token),
            as_stored=as_stored,
            source=source,
        )
        raise_faults(found.faults)
        return Checkpoint(snapshot.folder, source, known=found, as_stored=as_stored)
    fetch_weights(model, snapshot, token, on_bytes)
    return Checkpoint(snapshot.folder, source, as_stored=as_stored)


def _from_cache(folder: Path, source: str, unreachable: RemoteError, as_stored: bool) -> Checkpoint:
    """What an earlier run has downloaded, if it is complete; if not, the network is what is missing."""
    checkpoint = Checkpoint(folder, source, as_stored=as_stored)
    try:
        checkpoint.check()
    except MissingInputError as incomplete:
        raise unreachable from incomplete
    return checkpoint


def require_plain_files(checkpoint: Checkpoint) -> None:
    """Raise if the model is quantised or read by range: for work that writes its files again as they are stored."""
    if checkpoint.is_remote:
        raise UsageError(
            f"the weights files of {checkpoint.title} are not on this machine",
            "Give the id of the hub without hf://, which downloads them, or a folder",
        )
    if checkpoint.quantisation is not None:
        raise BadDataError(f"{checkpoint.title} is quantised ({checkpoint.quantisation})", USE_PLAIN)
