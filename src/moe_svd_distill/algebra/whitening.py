"""Coordinates in which inputs have unit second moment, and truncation of a linear map in the metric of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK = 1 << 14  # rows of a vocabulary in float64 at a time


@dataclass(frozen=True, eq=False)
class Whitening:
    """The symmetric roots of a second moment ``M = E[x xᵀ]``.

    Attributes:
        root: ``M^(1/2)``, (d, d): a map ``W`` on ``x`` is ``W M^(1/2)`` on whitened inputs.
        inverse: ``M^(-1/2)``, (d, d): whitened inputs are ``x M^(-1/2)``.
    """

    root: Float[Tensor, "d d"]
    inverse: Float[Tensor, "d d"]


def whitening(second_moment: Float[Tensor, "d d"], ridge: float = 1e-3) -> Whitening:
    """Roots of ``M + ridge · mean(diag M) · I``, computed in float64.

    The ridge bounds how far directions that the inputs hardly use are blown up.
    """
    moment = second_moment.double()
    moment = (moment + moment.T) / 2
    eye = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    values, vectors = torch.linalg.eigh(moment + ridge * moment.diagonal().mean() * eye)
    values = values.clamp_min(torch.finfo(torch.float64).tiny)
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    return Whitening(root.float(), inverse.float())


def truncated_in_metric(
    delta: Float[Tensor, "v d"], metric: Whitening, rank: int
) -> tuple[Float[Tensor, "v r"], Float[Tensor, "r d"]]:
    """``(B, A)`` of rank r that minimise ``E‖(Δ − B A) x‖²`` over inputs with the metric's second moment.

    The singular value decomposition of ``Δ M^(1/2)`` (Eckart–Young), times ``M^(-1/2)``; through the (d, d) Gram
    matrix, because a vocabulary is much longer than a hidden state is wide. ``A x`` has unit second moment.
    """
    scaled = delta @ metric.root
    gram = torch.zeros(delta.shape[1], delta.shape[1], dtype=torch.float64, device=delta.device)
    for begin in range(0, len(scaled), _BLOCK):
        block = scaled[begin : begin + _BLOCK].double()
        gram += block.T @ block
    _, vectors = torch.linalg.eigh(gram)
    leading = vectors[:, -rank:].flip(1).to(delta.dtype)
    return scaled @ leading, leading.T @ metric.inverse
