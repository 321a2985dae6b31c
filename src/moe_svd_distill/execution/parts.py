"""One file per finished unit of work, with the record of what became of every tensor.

Parts are the journal of a run. A part counts only if its name, its header and every byte of its tensors agree with the
digests inside; "it opens" is no proof. A damaged part is moved aside under another name and never deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from moe_svd_distill.errors import BadDataError, DistillError
from moe_svd_distill.files.dtypes import dtype_code, tensor_bytes
from moe_svd_distill.files.header import Header, Slot, encode_header, lay_out, read_header
from moe_svd_distill.files.reading import opened, read_pieces
from moe_svd_distill.files.writing import durable_file

if TYPE_CHECKING:
    import torch

_METADATA = "moe_svd_distill"  # the one metadata key: with two, the library's hash map would shuffle the file
_RUN_AGAIN = "Run the same command again; damaged parts are computed anew"


PartContent: TypeAlias = "tuple[dict[str, torch.Tensor], Mapping[str, Any]]"
"""What a unit of work hands back: name to tensor, on any device; and facts that JSON can hold, above all the fate of
every tensor. No times and no process numbers: the bytes of a part must not depend on when and where it was computed."""


def part_path(folder: Path, key: str) -> Path:
    """Where the part of the unit with this key lies."""
    return folder / f"part-{key}.safetensors"


def write_part(folder: Path, key: str, contents: Mapping[str, torch.Tensor], record: Mapping[str, object]) -> Path:
    """Write a part so that it is whole or absent; the same content gives the same bytes.

    Raises:
        CannotWriteError: The disk is full or the folder cannot be written to.
    """
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in contents.items()}
    slots = lay_out((name, dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())
    payload = hashlib.sha256()
    for slot in slots:
        payload.update(tensor_bytes(tensors[slot.name]))
    body = {"key": key, "record": json.loads(json.dumps(dict(record))), "payload_sha256": payload.hexdigest()}
    body["seal"] = _seal(body, slots)
    path = part_path(folder, key)
    with durable_file(path) as sink:
        text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        sink.write(encode_header(slots, {_METADATA: text}))
        for slot in slots:
            sink.write(tensor_bytes(tensors[slot.name]))
    return path


def find_fault(path: Path, key: str | None = None) -> str | None:
    """What is wrong with a part, or None when every byte of it is as it was written.

    Args:
        path: The part.
        key: The unit it must belong to; None accepts any unit.
    """
    try:
        header = read_header(path)
        body = dict(_body(header))
        if key is not None and body["key"] != key:
            return f"it belongs to unit {body['key']}"
        if body.pop("seal") != _seal(body, header.slots):
            return "its header was changed"
        payload = hashlib.sha256()
        with opened(path) as descriptor:
            for piece in read_pieces(descriptor, path, header.size, header.file_bytes):
                payload.update(piece)
        if payload.hexdigest() != body["payload_sha256"]:
            return "its bytes differ from their digest"
    except DistillError as error:
        return error.what
    return None


def reject_part(path: Path) -> Path:
    """Move a damaged part aside, under a name that no run looks for."""
    number = 1
    while (target := path.with_name(f"{path.name}.rejected-{number}")).exists():
        number += 1
    path.replace(target)
    return target


def verify_part(path: Path, key: str) -> bool:
    """Whether the part of this unit is there and whole; a damaged one is moved aside."""
    if not path.exists():
        return False
    if find_fault(path, key) is None:
        return True
    reject_part(path)
    return False


def read_record(path: Path) -> Mapping[str, Any]:
    """The record of a part, from its header alone.

    Raises:
        BadDataError: The part is damaged.
    """
    try:
        record: dict[str, Any] = _body(read_header(path))["record"]
    except DistillError as error:
        raise BadDataError(f"Part {path} cannot be used: {error.what}", _RUN_AGAIN) from error
    return record


def part_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a part by name, in that order; views of the mapped file, which is read as they are used.

    Raises:
        BadDataError: The part is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        names = sorted(read_header(path).tensors)
        opener: Any = safe_open
        with opener(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (DistillError, SafetensorError, OSError) as error:
        reason = error.what if isinstance(error, DistillError) else error
        raise BadDataError(f"Part {path} cannot be used: {reason}", _RUN_AGAIN) from error


class Parts(Mapping[str, "torch.Tensor"]):
    """The tensors of several parts, each read from its file when it is asked for. Use it in a ``with`` block.

    Attributes:
        slots: Name to type and shape.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Verify the parts once more, since hours may have passed.

        Raises:
            BadDataError: A part is damaged, or two parts hold a tensor of the same name.
        """
        self.slots: dict[str, Slot] = {}
        self._part_of: dict[str, Path] = {}
        for path in paths:
            if (fault := find_fault(path)) is not None:
                raise BadDataError(
                    f"Part {path} cannot be used: {fault}",
                    _RUN_AGAIN,
                )
            for slot in read_header(path).slots:
                if slot.name in self.slots:
                    raise BadDataError(
                        f"Tensor {slot.name} is in two parts: {self._part_of[slot.name].name} and {path.name}",
                        "Give every tensor to one unit of work; this is a fault of the plan, please report it",
                    )
                self.slots[slot.name], self._part_of[slot.name] = slot, path
        self._opened: dict[Path, dict[str, torch.Tensor]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._part_of[name]
        if path not in self._opened:
            self._opened[path] = part_tensors(path)
        return self._opened[path][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.clear()


def _body(header: Header) -> Mapping[str, Any]:
    try:
        body = json.loads(header.metadata[_METADATA])
        complete = {"key", "record", "payload_sha256", "seal"} <= set(body)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadDataError("its record cannot be read", _RUN_AGAIN) from error
    if not complete or not isinstance(body, dict):
        raise BadDataError("its record is incomplete", _RUN_AGAIN)
    return body


def _seal(body: Mapping[str, Any], slots: tuple[Slot, ...]) -> str:
    """The digest of the header itself: the digest of the payload would not notice a changed name or shape."""
    table = sorted([slot.name, slot.dtype, list(slot.shape), slot.begin, slot.end] for slot in slots)
    return hashlib.sha256(json.dumps([dict(body), table], sort_keys=True).encode()).hexdigest()
