"""Files of tensors that are each made when their turn comes: an adapter is written without ever being in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.memory import give_back
from moe_svd_distill.files.dtypes import dtype_code, tensor_bytes
from moe_svd_distill.files.header import encode_header, lay_out
from moe_svd_distill.files.writing import durable_file

if TYPE_CHECKING:
    import torch

_LARGE = 1 << 20  # bytes of a tensor worth giving back at once


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
    make: Callable[[], torch.Tensor]


def write_tensors(planned: Mapping[str, Planned], output: Path) -> str:
    """Write one safetensors file, sorted by name, each tensor made when its turn comes.

    Args:
        planned: Name to what is to be written.
        output: The file, replaced only when the new one is whole.

    Returns:
        The sha256 of the file.

    Raises:
        CannotWriteError: The output cannot be written.
        BadDataError: A value is not finite; the file is left as it was.
        ValueError: A tensor is made of another type or shape than planned; a fault of the caller.
    """
    slots = lay_out((name, dtype_code(plan.dtype), plan.shape) for name, plan in planned.items())
    with durable_file(output) as sink:
        sink.write(encode_header(slots, {"format": "pt"}))
        for slot in slots:
            data = made(planned, slot.name, output.name)
            sink.write(data)
            large = data.nbytes >= _LARGE
            del data
            if large:
                give_back()
    return sink.sha256


def made(planned: Mapping[str, Planned], name: str, file: str) -> memoryview:
    """The bytes of a planned tensor.

    Raises:
        BadDataError: A value is not finite.
        ValueError: It is made of another type or shape than planned; a fault of the caller.
    """
    from moe_svd_distill.algebra.dtypes import count_not_finite

    plan, tensor = planned[name], planned[name].make()
    if tuple(tensor.shape) != plan.shape or tensor.dtype != plan.dtype:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned {plan}")
    if count := count_not_finite(tensor):
        raise BadDataError(
            f"{name} of {file} would hold {count} NaN or Inf of {tensor.numel()} values in "
            f"{tensor.dtype}, so it is not written",
            "Check both models; where dtype is float16, try bfloat16",
        )
    return tensor_bytes(tensor.to("cpu"))
