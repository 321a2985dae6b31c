"""Putting parts together into one file without ever holding the adapter in memory: one tensor is made at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.memory import give_back
from moe_svd_distill.execution.parts import PartTensors, find_fault, open_part
from moe_svd_distill.files.dtypes import dtype_code, tensor_bytes
from moe_svd_distill.files.header import Slot, encode_header, lay_out, read_header
from moe_svd_distill.files.writing import durable_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LARGE = 1 << 20


@dataclass(frozen=True)
class Planned:
    """A tensor of a file that is to be written.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        make: Makes it, when its turn comes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


class Parts(Mapping[str, "Tensor"]):
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
                    "Run the same command again; damaged parts are computed anew",
                )
            for slot in read_header(path).slots:
                if slot.name in self.slots:
                    raise BadDataError(
                        f"Tensor {slot.name} is in two parts: {self._part_of[slot.name].name} and {path.name}",
                        "Give every tensor to one unit of work; this is a fault of the plan, please report it",
                    )
                self.slots[slot.name], self._part_of[slot.name] = slot, path
        self._opened: dict[Path, PartTensors] = {}
        self._stack = ExitStack()

    def __getitem__(self, name: str) -> Tensor:
        path = self._part_of[name]
        if path not in self._opened:
            self._opened[path] = self._stack.enter_context(open_part(path))
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
        self._stack.close()


def write_tensors(planned: Mapping[str, Planned], output: Path) -> str:
    """Write one safetensors file, sorted by name, each tensor made when its turn comes.

    Args:
        planned: Name to what is to be written.
        output: The file, replaced only when the new one is whole.

    Returns:
        The sha256 of the file.

    Raises:
        CannotWriteError: The output cannot be written.
        ValueError: A tensor is made of another type or shape than planned; a fault of the caller.
    """
    slots = lay_out((name, dtype_code(plan.dtype), plan.shape) for name, plan in planned.items())
    with durable_file(output) as sink:
        sink.write(encode_header(slots, {"format": "pt"}))
        for slot in slots:
            plan, tensor = planned[slot.name], planned[slot.name].make()
            if tuple(tensor.shape) != plan.shape or tensor.dtype != plan.dtype:
                raise ValueError(f"{slot.name} is {tensor.dtype} {tuple(tensor.shape)}, planned {plan}")
            sink.write(tensor_bytes(tensor.to("cpu")))
            large = tensor.nbytes >= _LARGE
            del tensor
            if large:
                give_back()
    return sink.sha256
