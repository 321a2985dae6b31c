"""An adapter with every pair multiplied by a factor: what the scale search hands over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.adapter.adapter_file import adapter_header, read_tensor
from moe_svd_distill.adapter.naming import parse_key
from moe_svd_distill.adapter.rewriting import rewrite
from moe_svd_distill.checkpoints import TensorInfo
from moe_svd_distill.errors import BadDataError, UsageError

if TYPE_CHECKING:
    import torch


def scaled_copy(adapter_file: Path | str, output_file: Path | str, factor_of: Callable[[str], float]) -> None:
    """Write a copy of an adapter whose factors B are multiplied; A is copied byte for byte.

    Args:
        adapter_file: The adapter's tensors.
        output_file: The copy; it may be the same file, which is then replaced.
        factor_of: Factor by hub name. 1 copies B byte for byte, 0 makes it zero.

    Raises:
        UsageError: A factor is not a finite number.
        BadDataError: A product leaves the range of the stored dtype.
    """

    def change(info: TensorInfo) -> Iterator[torch.Tensor] | None:
        hub_name, side = parse_key(info.name)
        if side == "A":
            return None
        factor = float(factor_of(hub_name))
        if not math.isfinite(factor):
            raise UsageError(
                f"the factor of {hub_name} is {factor}, expected a finite number", "Search the scale again"
            )
        return None if factor == 1.0 else _scaled(info, factor)

    rewrite(adapter_header(adapter_file), Path(output_file), change)


def _scaled(info: TensorInfo, factor: float) -> Iterator[torch.Tensor]:
    import torch

    stored = read_tensor(info)  # (out, rank)
    if factor == 0.0:
        yield torch.zeros_like(stored)
        return
    scaled = (stored.float() * factor).to(stored.dtype)
    if not bool(torch.isfinite(scaled).all()):
        raise BadDataError(f"{info.name} times {factor} is not finite in {info.dtype}", "Use a smaller factor")
    yield scaled
