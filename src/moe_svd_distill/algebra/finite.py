"""Values that are no numbers: how many a tensor has, at the price of one sum where it has none."""

from __future__ import annotations

import torch
from torch import Tensor


def count_not_finite(tensor: Tensor) -> int:
    """How many of a tensor's entries are NaN or Inf; either makes the sum so, and few finite tensors' sums are."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
        return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())
