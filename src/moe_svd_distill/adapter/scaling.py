"""An adapter with every change multiplied by a factor: what the scale search hands over.

Of a pair, B carries the factor. A head saved whole becomes ``W + s (W' - W)``, for which the student's W is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.adapter.adapter_file import CONFIGURATION_FILE, adapter_header, read_json, read_tensor
from moe_svd_distill.adapter.naming import parse_key
from moe_svd_distill.adapter.pair_shapes import WholeShape
from moe_svd_distill.adapter.rewriting import rewrite
from moe_svd_distill.adapter.whole_head import base_head, shifted, student_of
from moe_svd_distill.checkpoints import Checkpoint, TensorInfo
from moe_svd_distill.errors import BadDataError, UsageError

if TYPE_CHECKING:
    import torch


def scaled_copy(
    adapter_file: Path | str,
    output_file: Path | str,
    factor_of: Callable[[str], float],
    student: Checkpoint | Path | str | None = None,
) -> None:
    """Write a copy of an adapter whose factors B are multiplied; A is copied byte for byte.

    A head saved whole that is scaled is rounded to its stored dtype once more. Scale from the original, not from a
    scaled copy, where that dtype is narrow.

    Args:
        adapter_file: The adapter's tensors.
        output_file: The copy; it may be the same file, which is then replaced.
        factor_of: Factor by hub name. 1 copies the bytes, 0 makes B zero and a head saved whole the student's own.
        student: The student or its folder, for a head saved whole. Without it the base model that adapter_config.json
            beside the adapter names is used, if that is a folder here.

    Raises:
        UsageError: A factor is not a finite number, or a head saved whole is to be scaled and no student is at hand.
        BadDataError: A product leaves the range of the stored dtype, or the student's head has another shape.
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
        if factor == 1.0:
            return None
        return _scaled_head(info, hub_name, factor, base_of(info)) if side == "whole" else _scaled(info, factor)

    def base_of(info: TensorInfo) -> Checkpoint:
        beside = info.file.parent / CONFIGURATION_FILE
        configuration = read_json(beside) if beside.is_file() else {}
        return student_of(student, configuration, "scaling")

    rewrite(adapter_header(adapter_file), Path(output_file), change)


def _scaled_head(info: TensorInfo, hub_name: str, factor: float, student: Checkpoint) -> Iterator[torch.Tensor]:
    import torch

    new = read_tensor(info)  # (V, d)
    base = base_head(student, WholeShape(hub_name, info.name, *new.shape))

    def change(rows: slice) -> torch.Tensor:
        wide = torch.float64 if torch.float64 in (new.dtype, base.dtype) else torch.float32
        return new[rows].to(wide) - base[rows].to(wide)

    return shifted(base, change, factor, new.dtype, info.name)


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
