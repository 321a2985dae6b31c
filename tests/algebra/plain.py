"""The plain formulas in float64 that the fast ways are held against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PlainSvd(NamedTuple):
    """The best approximation of a matrix at a rank (Eckart-Young)."""

    product: Tensor
    residual: float  # relative, Frobenius
    singular_values: Tensor  # all of the matrix


def plain_truncated_svd(matrix: Tensor, rank: int) -> PlainSvd:
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    norm = float(S.norm())
    residual = float(S[rank:].norm()) / norm if norm else 0.0
    return PlainSvd((U[:, :rank] * S[:rank]) @ Vh[:rank], residual, S)
