"""From what the user typed to a checked checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_svd_distill.checkpoints.checkpoint import Checkpoint
from moe_svd_distill.checkpoints.configuration import USE_PLAIN, declared_quantisation, read_config
from moe_svd_distill.checkpoints.downloads import OnBytes
from moe_svd_distill.checkpoints.hub import (
    HUB,
    Snapshot,
    fetch_headers,
    fetch_small,
    fetch_weights,
    parse_hub_id,
    redact,
    say_once,
)
from moe_svd_distill.checkpoints.llama_cpp.folder import file_behind
from moe_svd_distill.checkpoints.remote.folder import keep
from moe_svd_distill.checkpoints.remote.source import is_address
from moe_svd_distill.checkpoints.shards import GGUF
from moe_svd_distill.checkpoints.storage import Storage
from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError, UsageError, shown
from moe_svd_distill.files.header import Header
from moe_svd_distill.files.reading import explain

_BLOCK_ROWS = 4096


def open_checkpoint(
    model: str | Path,
    *,
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
        headers_only: Of a hub model, fetch the small files and the headers only. Tensors cannot be read then.
        on_bytes: Told how far a download is.
        remote_bytes: What fetched tensors of an address may take on the disk; None for what was said before, or all.
    """
    source = str(model)
    if is_address(source):
        place: Path | None
        place, cache_note = keep(source, remote_bytes)
        source = redact(source.removeprefix(f"{HUB}://"))
    else:
        place, cache_note = _local_place(model), ""
    if place:
        checkpoint = Checkpoint(place, source)
        checkpoint.cache_note = cache_note
    else:
        checkpoint = _from_hub(source, headers_only, on_bytes)
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


class _HeadersOnly(Storage):
    """A hub model in the cache without its weights files."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(snapshot.folder)
        self._snapshot = snapshot

    def file_names(self) -> Sequence[str]:
        return self._snapshot.names

    def headers(self, files: Sequence[str]) -> dict[str, Header | DistillError]:
        return fetch_headers(self._snapshot, files)


def _from_hub(source: str, headers_only: bool, on_bytes: OnBytes | None) -> Checkpoint:
    """The model in the hub's cache: all of it, or the small files with the headers of the weights."""
    model = parse_hub_id(source)
    if model is None:
        what = f"{shown(source)} is neither a folder nor the name of a hub model"
        raise MissingInputError(what, "Give the folder of a model, or organisation/name@revision")
    snapshot = fetch_small(model)
    declared_quantisation(read_config(snapshot.folder), source)  # refused before anything large is downloaded
    if snapshot.unreachable is not None:
        checkpoint = Checkpoint(snapshot.folder, source)
        try:
            checkpoint.check()
        except MissingInputError as incomplete:  # the network is what is missing
            raise snapshot.unreachable from incomplete
        checkpoint.cache_note = snapshot.cache_note
        return checkpoint
    if headers_only:
        return Checkpoint(snapshot.folder, source, storage=_HeadersOnly(snapshot))
    fetch_weights(snapshot, on_bytes)
    return Checkpoint(snapshot.folder, source)


def require_plain_files(checkpoint: Checkpoint) -> None:
    """Raise if the model is quantised or read by range: for work that writes its files again as they are stored."""
    if checkpoint.is_remote:
        raise UsageError(
            f"the weights files of {checkpoint.title} are not on this machine",
            "Give the id of the hub without hf://, which downloads them, or a folder",
        )
    if checkpoint.quantisation is not None:
        raise BadDataError(f"{checkpoint.title} is quantised ({checkpoint.quantisation})", USE_PLAIN)


def refuse_other_head(checkpoint: Checkpoint, head: str, embedding: str) -> None:
    """Refuse a model that ties its head to its embeddings, which are stored under these names, if the two differ.

    transformers 5 takes the stored head, vLLM and earlier versions take the embeddings: whatever was made for the one
    would be wrong with the other.

    Raises:
        BadDataError: The two differ.
    """
    import torch

    shapes = checkpoint[head].shape, checkpoint[embedding].shape
    same = shapes[0] == shapes[1] and all(
        torch.equal(*(checkpoint.read_rows(name, begin, begin + _BLOCK_ROWS).float() for name in (head, embedding)))
        for begin in range(0, shapes[0][0], _BLOCK_ROWS)
    )
    if not same:
        raise BadDataError(
            f"{checkpoint.title} ties its head to its embeddings, but {shown(head)} and {shown(embedding)} differ in "
            "its files: transformers 5 takes the head, other programs the embeddings",
            "Set tie_word_embeddings to false in config.json if the head is meant, else remove the head from the files",
        )
