"""Keeping only the largest entries of a weight difference."""

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
    threshold = magnitude.kthvalue(size - kept + 1).values
    mask = magnitude > threshold
    ties = (magnitude == threshold).nonzero().squeeze(1)[: kept - int(mask.sum())]
    mask[ties] = True
    sparse = torch.where(mask.view_as(delta), delta, torch.zeros_like(delta))
    if not rescale:
        return sparse
    before = torch.linalg.vector_norm(delta, dtype=torch.float32)
    after = torch.linalg.vector_norm(sparse, dtype=torch.float32)
    return sparse if float(after) == 0.0 else (sparse * (before / after)).to(delta.dtype)
