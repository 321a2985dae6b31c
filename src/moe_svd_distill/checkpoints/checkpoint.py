"""A model's weights as a read-only mapping, with their numbers on demand."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from moe_svd_distill.checkpoints.identity import GGUF_SCHEME, SCHEME, fingerprint
from moe_svd_distill.checkpoints.quantisation.coded import Scaled
from moe_svd_distill.checkpoints.remote.folder import RemoteFolder
from moe_svd_distill.checkpoints.shards import GGUF
from moe_svd_distill.checkpoints.storage import GgufFiles, Storage, changed
from moe_svd_distill.checkpoints.survey import Survey, raise_faults, survey
from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.header import Header, TensorInfo

if TYPE_CHECKING:
    import torch

COMMIT = re.compile(r"[0-9a-f]{40}")


class Checkpoint(Mapping[str, TensorInfo]):
    """A read-only mapping from a weight's name to its shape and dtype, and the way to its numbers.

    A quantised model looks like a plain one: each weight has the shape and dtype that it has when dequantised, and its
    scales and other companions are no members. ``bytes`` of a weight counts what is in the files, companions included.

    The headers are read and checked at the first use; a checkpoint with a fault raises then. Files are opened when one
    of their tensors is read first, and stay open until :meth:`close`. A checkpoint may be sent to another process: it
    reads the headers there again, and refuses files that are not the same any more. Reading from several threads is
    safe.

    Attributes:
        source: What the user called it.
        role: Teacher or student, once that is known.
        cache_note: That the hub was not asked and its cache was read; empty where that is not so.
    """

    def __init__(self, place: Path, source: str | None = None, *, storage: Storage | None = None) -> None:
        """Open nothing yet: a folder or a GGUF file, what the user called it, and its storage where that is special."""
        self._place = place.absolute()
        self.role = self.cache_note = ""
        self.source = str(place) if source is None else source
        self._survey: Survey | None = None
        self._given = storage
        self._expected: Mapping[str, tuple[int, str]] | None = None
        self._lock = threading.RLock()

    def check(self) -> None:
        """Read and check every header now, instead of at the first use."""
        self._sound()

    @property
    def config(self) -> Mapping[str, object]:
        """The model's ``config.json``."""
        return self._sound().config

    @property
    def folder(self) -> Path:
        """Where configuration and tokenizer lie; for a GGUF file they are made, in a folder that goes with the process.

        Raises:
            BadDataError: No tokenizer can be made of the file.
        """
        found = self._sound()
        return self._storage.model_folder(found.headers, found.config)

    @property
    def tokenizer_notes(self) -> tuple[str, ...]:
        """What people should know of where the tokenizer is from; nothing where it is the model's own."""
        from moe_svd_distill.checkpoints.llama_cpp.folder import why_from_beside

        why = why_from_beside(self.folder)
        what = f"the tokenizer of {self.source} is the tokenizer.json beside it: transformers makes none of the file"
        return () if why is None else (f"{what} ({why})",)

    @property
    def notes(self) -> tuple[str, ...]:
        """That the hub's cache stood in for the hub; where the configuration says otherwise than the weights."""
        return (*filter(None, [self.cache_note]), *self._sound().weights.notes)

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file."""
        return self._storage.is_gguf

    @property
    def is_remote(self) -> bool:
        """Whether its weights files are not on this machine, and tensors are fetched as they are read."""
        return self._storage.is_remote

    @property
    def is_readable(self) -> bool:
        """Whether numbers can be read: the weights files are here, or it is read by range."""
        return self._storage.is_readable(self.stored.values())

    @cached_property
    def _storage(self) -> Storage:
        if self._place.suffix.lower() == GGUF:
            return GgufFiles(self._place)
        return self._given or RemoteFolder.of(self._place) or Storage(self._place)

    @property
    def origin(self) -> tuple[str, str] | None:
        """The hub checkpoint that a GGUF file says it was made from, and the key of its metadata that says so."""
        return self._sound().origin

    @property
    def title(self) -> str:
        """What to call the model in a message: its source, and its role where it has one."""
        return f"{self.role} {self.source}" if self.role else self.source

    @property
    def commit(self) -> str | None:
        """The commit that a hub model is pinned to, or ``None`` for a folder that does not come from the hub."""
        is_snapshot = self._place.parent.name == "snapshots" and COMMIT.fullmatch(self._place.name)
        return self._place.name if is_snapshot else None

    @property
    def quantisation(self) -> str | None:
        """Method and codings of a quantised model in words, such as ``fp8: float8 in blocks of 128×128``."""
        return self._sound().weights.quantisation

    @property
    def stored(self) -> Mapping[str, TensorInfo]:
        """The tensors as they are in the files: of a quantised model, codes and companions."""
        return self._sound().weights.stored

    @property
    def companions(self) -> Mapping[str, str]:
        """Name of a stored tensor to that of the weight it is a part of, where the names differ."""
        return self._sound().weights.companions

    @property
    def set_aside(self) -> Mapping[str, str]:
        """Name of a stored tensor that is no part of any weight to the reason why none needs it."""
        return self._sound().weights.set_aside

    @property
    def total_bytes(self) -> int:
        """The bytes of all stored tensors together, from the headers."""
        return sum(info.bytes for info in self.stored.values())

    def __getitem__(self, name: str) -> TensorInfo:
        return self._sound().weights.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sound().weights.tensors)

    def __len__(self) -> int:
        return len(self._sound().weights.tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r})"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def read(self, name: str, *, device: str | torch.device = "cpu") -> torch.Tensor:
        """The weight: of a plain one the stored numbers, of a quantised one the dequantised numbers.

        A plain weight on the CPU is a private view on the file: nothing is copied, and a change made in place stays in
        this one tensor. On another device it is a copy there. Dequantising needs memory for the result and little more.
        """
        return self.read_rows(name, 0, None, device=device)

    def read_rows(self, name: str, begin: int, end: int | None, *, device: str | torch.device = "cpu") -> torch.Tensor:
        """``read(name)[begin:end]``, along the first dimension; of a quantised weight only those are dequantised."""
        info = self._sound().weights.tensors.get(name)
        if info is None:
            raise BadDataError(f"{self.title} has no tensor {shown(name)}", "Check the names with `inspect`")
        rows = slice(begin, end)
        coded = self._sound().weights.coded.get(name)
        if coded is None:
            tensor = self._stored_view(info)
            tensor = tensor[rows] if tensor.ndim and rows != slice(0, None) else tensor
            return tensor if str(device) == "cpu" else tensor.to(device)
        from moe_svd_distill.checkpoints.quantisation.decoding import dequantise

        parts = {part: self._stored_view(stored) for part, stored in coded.parts.items()}
        return dequantise(coded, parts, rows, device)

    def read_matrix(self, name: str, index: int, begin: int, end: int | None, *, transposed: bool) -> torch.Tensor:
        """Rows of ``read(name)[index]``, or of its transpose; where they are stored as rows, only they are dequantised.

        Args:
            name: A weight with three dimensions.
            index: Which of its matrices.
            begin: First row.
            end: Row after the last one; None for all.
            transposed: Whether the rows are those of the transpose.
        """
        coded = self._sound().weights.coded.get(name)
        if coded is None or not isinstance(coded.coding, Scaled) or coded.coding.transposed != transposed:
            matrix = self.read_rows(name, index, index + 1)[0]
            return (matrix.mT if transposed else matrix)[begin:end]
        from moe_svd_distill.checkpoints.quantisation.decoding import dequantise_matrix

        parts = {part: self._stored_view(stored) for part, stored in coded.parts.items()}
        return dequantise_matrix(coded, coded.coding, parts, index, slice(begin, end))

    def _stored_view(self, info: TensorInfo) -> torch.Tensor:
        """A stored tensor, as a view on its file."""
        return self._storage.view(info, self._sound().headers)

    def prefetch(self, names: Iterable[str]) -> None:
        """Of a remote model, fetch these weights side by side; of any other, nothing.

        Raises:
            RemoteError: They cannot be fetched.
        """
        coded, stored = self._sound().weights.coded, self._sound().weights.stored
        self._storage.prefetch(
            part for name in names for part in (coded[name].parts.values() if name in coded else [stored[name]])
        )

    def look_again(self) -> Survey:
        """What the headers say now, with all that is wrong with them."""
        if self.is_gguf:
            from moe_svd_distill.checkpoints.llama_cpp.survey import survey_gguf

            return survey_gguf(self._place, self.source)
        return survey(self._storage, self.source)

    def cache_key(self) -> str:
        """A digest that changes when any byte of the model may have: names what is computed from it and kept.

        It is taken from the files as they are now, so that a model replaced during a run is noticed.
        """
        return self._storage.cache_key(self._sound().headers)

    def fingerprint(self) -> str:
        """A name for the weights that a copy of the model has too (`identity.fingerprint`)."""
        return fingerprint(self.stored, self._storage.extracts, gguf=self.is_gguf)

    def is_other_than(self, recorded: str | None) -> bool:
        """Whether a recorded fingerprint is of other weights; an older one, or one of other files, does not say it."""
        scheme = GGUF_SCHEME if self.is_gguf else SCHEME
        return recorded is not None and recorded.startswith(scheme) and recorded != self.fingerprint()

    def close(self) -> None:
        """Close the files; tensors that were read stay valid, and a later read opens the files again."""
        self._storage.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return _sent, (self._place, self.source, self.role, _state_of(self._sound().headers))

    def is_plain(self, name: str) -> bool:
        """Whether a weight is stored as the numbers it is read as."""
        return name not in self._sound().weights.coded

    def _sound(self) -> Survey:
        """The headers, read once, or the error that names all that is wrong with them."""
        if self._survey is None:
            with self._lock:
                if self._survey is None:
                    found = self.look_again()
                    raise_faults(found.faults)
                    self._compare(found.headers)
                    self._survey = found
        return self._survey

    def _compare(self, headers: dict[str, Header]) -> None:
        """In another process: the files have to be the same as where this checkpoint came from."""
        if self._expected is None:
            return
        found = _state_of(headers)
        for name in sorted(self._expected.keys() | found.keys()):
            if self._expected.get(name) != found.get(name):
                raise changed(self._storage.directory / name)


def _state_of(headers: Mapping[str, Header]) -> dict[str, tuple[int, str]]:
    """Of each file its size and the digest of its header."""
    return {name: (header.file_bytes, header.digest) for name, header in headers.items()}


def _sent(place: Path, source: str, role: str, expected: Mapping[str, tuple[int, str]]) -> Checkpoint:
    """A checkpoint that came from another process."""
    checkpoint = Checkpoint(place, source)
    checkpoint.role, checkpoint._expected = role, expected
    return checkpoint
