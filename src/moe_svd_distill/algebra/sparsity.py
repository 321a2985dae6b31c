"""Keeping only the largest entries of a weight difference."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def keep_largest(delta: Float[Tensor, "*shape"], fraction: float, rescale: bool) -> Float[Tensor, "*shape"]:
    """The ``fraction`` of entries largest in magnitude, others zero; with ``rescale`` the norm of ``delta`` is kept.

    Exactly ``round(fraction * size)`` entries, at least one; among equals the earlier ones. The newer generation of the
    public scripts calls this DARE-TIES and keeps 0.2.

    Raises:
        ValueError: fraction outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must lie in (0, 1], not {fraction}")
    size = delta.numel()
    kept = max(1, round(fraction * size))
    if kept >= size:
        return delta.clone()
    magnitude = delta.abs().flatten()
    threshold = _in_order(magnitude, size - kept)
    mask = magnitude >= threshold
    surplus = int(mask.sum()) - kept
    if surplus:
        ties = (magnitude == threshold).nonzero().squeeze(1)
        mask[ties[len(ties) - surplus :]] = False
    sparse = torch.where(mask.view_as(delta), delta, torch.zeros_like(delta))
    if not rescale:
        return sparse
    before, after = _norm(delta), _norm(sparse)
    return sparse if after == 0.0 else sparse * (before / after)


def _in_order(values: Float[Tensor, "size"], place: int) -> float:
    """The value at ``place`` (from 0) of the sorted values. numpy's selection is ten times faster than torch's."""
    if values.device.type == "cpu":
        numbers = values.float() if values.element_size() < 4 else values
        return float(np.partition(numbers.numpy(), place)[place])
    return float(values.kthvalue(place + 1).values)


def _norm(tensor: Float[Tensor, "*shape"]) -> float:
    accumulator = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=accumulator))
