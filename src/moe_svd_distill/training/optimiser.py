"""What moves the factors and the head along their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from moe_svd_distill.algebra.orthogonal_step import adam_like_size, near_polar_factor
from moe_svd_distill.training.factors import FactorBank
from moe_svd_distill.training.peers import Peers

OptimiserName: TypeAlias = Literal["muon", "adamw"]
_TINY = 1e-10


class Optimiser(Protocol):
    """Moves values in place."""

    def step(self, rate: float) -> None:
        """Move along the gradient that lies beside the values."""

    def tensors(self) -> dict[str, Tensor]:
        """What must be on the disk to go on from here."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from there."""


class AdamW:
    """torch's own AdamW on one flat tensor."""

    def __init__(self, values: Tensor, gradient: Tensor, betas: tuple[float, float], weight_decay: float) -> None:
        """Begin at zero.

        Args:
            values: Flat, moved in place.
            gradient: Of the same length, filled before each step.
            betas: Decay of the two moments.
            weight_decay: Decoupled.
        """
        values.grad = gradient
        self._values = values
        self._adamw = torch.optim.AdamW([values], betas=betas, eps=_TINY, weight_decay=weight_decay, fused=True)

    def step(self, rate: float) -> None:
        """As `Optimiser`."""
        self._adamw.param_groups[0]["lr"] = rate
        self._adamw.step()

    def tensors(self) -> dict[str, Tensor]:
        """As `Optimiser`."""
        return dict(self._adamw.state[self._values])

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """As `Optimiser`."""
        device = self._values.device
        self._adamw.state[self._values] = {name: tensor.clone().to(device) for name, tensor in tensors.items()}


class Muon:
    """Steps of equal size in all directions of each factor, from Nesterov momentum."""

    def __init__(self, bank: FactorBank, momentum: float, weight_decay: float, peers: Peers) -> None:
        """Begin at zero.

        Args:
            bank: Whose factors move.
            momentum: Decay of the mean gradient.
            weight_decay: Decoupled.
            peers: Each computes the steps of some factors and is told those of the others.
        """
        self._bank, self._momentum, self._decay, self._peers = bank, momentum, weight_decay, peers
        self._mean = torch.zeros_like(bank.values)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """As `Optimiser`."""
        bank, share = self._bank, 1 - self._momentum
        self._mean.lerp_(bank.gradient, share)
        ahead = torch.lerp(self._mean, bank.gradient, share)
        if self._decay:
            bank.values.mul_(1 - rate * self._decay)
        steps = torch.zeros_like(ahead) if self._peers.count > 1 else ahead
        for number, (begin, end, shape) in enumerate(bank.blocks):
            if number // 2 % self._peers.count == self._peers.number:  # A and B of a stack together: even shares
                found = near_polar_factor(ahead[begin:end].view(shape))
                steps[begin:end] = found.mul_(adam_like_size(*shape[1:])).reshape(-1)
        self._peers.add_up(steps)
        bank.values.add_(steps, alpha=-rate)

    def tensors(self) -> dict[str, Tensor]:
        """As `Optimiser`."""
        return {"mean": self._mean}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """As `Optimiser`."""
        self._mean.copy_(tensors["mean"])
