"""What is in an adapter's tensors: nothing that is not finite, and no tail of zeros that a broken write left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_svd_distill.adapter.adapter_file import read_tensor
from moe_svd_distill.adapter.naming import parse_key
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.files.dtypes import FLOATS
from moe_svd_distill.files.header import Header

if TYPE_CHECKING:
    import torch

TAIL_BYTES = 4096


def scan_values(header: Header, *, digest_checked: bool) -> tuple[str, ...]:
    """Look at every value, one tensor at a time.

    Args:
        header: Of the adapter's file.
        digest_checked: Whether the file is known to be complete; if not, a zero-filled tail is looked for.

    Returns:
        Modules of the pairs that are zero, sorted.

    Raises:
        BadDataError: A tensor has NaN or Inf, is not of a floating-point dtype, or breaks off into zeros; or a head
            that is saved whole is zero.
    """
    zero: set[str] = set()
    broken_off, tail = "", 0  # the tensor that holds the file's last nonzero value, and the zero bytes behind it
    for name, info in header.tensors.items():
        if info.dtype not in FLOATS:
            raise BadDataError(
                f"{name} is {info.dtype}, expected one of {', '.join(FLOATS)}", "Write the adapter again"
            )
        tensor = read_tensor(info)  # (rank, in) or (out, rank)
        _refuse_not_finite(name, tensor)
        filled = tensor.any(dim=1).nonzero()
        if not len(filled):
            module, side = parse_key(name)
            if side == "whole":
                raise BadDataError(
                    f"{name} is zero throughout: a head of zeros says nothing", "Write the adapter again"
                )
            zero.add(module)
            tail += info.bytes
            continue
        end = int(filled[-1])
        broken_off = name if _breaks_off(tensor, end) else ""
        tail = (tensor.shape[0] - 1 - end) * info.bytes // tensor.shape[0]
    if broken_off and tail >= TAIL_BYTES and not digest_checked:
        raise BadDataError(
            f"{broken_off} breaks off inside a row, and the rest of the file is zero: it was not written to the end",
            "Copy it again, or run the distillation again",
        )
    return tuple(sorted(zero))


def _refuse_not_finite(name: str, tensor: torch.Tensor) -> None:
    import torch

    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        count = int((~finite).sum())
        raise BadDataError(f"{name}: {count} of {tensor.numel()} values are NaN or Inf", "Write the adapter again")


def _breaks_off(tensor: torch.Tensor, end: int) -> bool:
    """Whether the values of a matrix stop in the middle of row ``end``, after which there are only zeros.

    Columns that are zero in the earlier rows too, as where a rank was padded with zeros, do not count.
    """
    if end in (0, tensor.shape[0] - 1):
        return False
    stop = int(tensor[end].nonzero()[-1]) + 1
    lost = int(tensor[:end, stop:].any(dim=0).sum())
    return 4 * lost >= tensor.shape[1]
