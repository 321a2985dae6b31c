"""Putting the parts together into one file, without ever holding the adapter in memory.

Tensors travel from the parts to the output in pieces of a few megabytes; one that is to be scaled is loaded, alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.durable import Sink, durable_file
from moe_svd_distill.execution.memory import give_back
from moe_svd_distill.execution.parts import PartTensors, find_fault, open_part, tensor_bytes
from moe_svd_distill.execution.tensor_file import (
    DamagedFileError,
    Slot,
    encode_header,
    lay_out,
    read_bytes,
    read_header,
)

if TYPE_CHECKING:
    from torch import Tensor

_LARGE = 1 << 20
_RUN_AGAIN = "Run the same command again; damaged parts are computed anew"


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the output comes from."""

    part: Path
    header_size: int
    slot: Slot


def consolidate(
    parts: Sequence[Path],
    output: Path,
    *,
    rename: Callable[[str], str | None] | None = None,
    scale: Callable[[str, Tensor], Tensor] | None = None,
) -> str:
    """Write the tensors of all parts into one safetensors file, sorted by name, whatever the order of the parts.

    Args:
        parts: The parts; each is verified once more, since hours may have passed.
        output: The file, replaced only when the new one is whole.
        rename: Gives a tensor its name in the output; None leaves the tensor out.
        scale: Called with the output's name and the tensor; must keep shape and dtype. Without it no tensor is loaded.

    Returns:
        The sha256 of the file.

    Raises:
        BadDataError: A part is damaged, or two parts hold a tensor of the same name.
        CannotWriteError: The output cannot be written.
    """
    sources = _gather(parts, rename)
    slots = lay_out((name, source.slot.dtype, source.slot.shape) for name, source in sources.items())
    opened: dict[Path, PartTensors] = {}
    with ExitStack() as stack:
        sink = stack.enter_context(durable_file(output))
        sink.write(encode_header(slots, {"format": "pt"}))
        for slot in slots:
            source = sources[slot.name]
            if scale is None:
                _copy(source, sink)
                continue
            if source.part not in opened:
                opened[source.part] = stack.enter_context(open_part(source.part))
            _copy_scaled(opened[source.part], source, slot, scale, sink)
    return sink.sha256


def _gather(parts: Sequence[Path], rename: Callable[[str], str | None] | None) -> dict[str, _Source]:
    sources: dict[str, _Source] = {}
    for part in parts:
        fault = find_fault(part)
        if fault is not None:
            raise _damaged(part, fault)
        header = read_header(part)
        for slot in header.slots:
            name = rename(slot.name) if rename else slot.name
            if name is None:
                continue
            if name in sources:
                raise _duplicate(name, sources[name].part, part)
            sources[name] = _Source(part, header.size, slot)
    return sources


def _damaged(part: Path, fault: str) -> BadDataError:
    return BadDataError(f"Part {part} cannot be used: {fault}", _RUN_AGAIN)


def _duplicate(name: str, first: Path, second: Path) -> BadDataError:
    return BadDataError(
        f"Tensor {name} is in two parts: {first.name} and {second.name}",
        "Give every tensor to one unit of work; this is a fault of the plan, please report it",
    )


def _copy(source: _Source, sink: Sink) -> None:
    begin = source.header_size + source.slot.begin
    try:
        for piece in read_bytes(source.part, begin, begin + source.slot.end - source.slot.begin):
            sink.write(piece)
    except DamagedFileError as error:
        raise _damaged(source.part, str(error)) from error


def _copy_scaled(
    tensors: PartTensors, source: _Source, slot: Slot, scale: Callable[[str, Tensor], Tensor], sink: Sink
) -> None:
    tensor = tensors[source.slot.name]
    scaled = scale(slot.name, tensor)
    if scaled.shape != tensor.shape or scaled.dtype != tensor.dtype:
        raise ValueError(
            f"scaling changed {slot.name} from {tensor.dtype} {tuple(tensor.shape)} "
            f"to {scaled.dtype} {tuple(scaled.shape)}"
        )
    sink.write(tensor_bytes(scaled.detach().to("cpu").contiguous()))
    if scaled.nbytes >= _LARGE:
        del scaled
        give_back()
