"""What moves the factors and the head along their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from moe_svd_distill.algebra.orthogonal_step import adam_like_size, near_polar_factor
from moe_svd_distill.training.factors import FactorBank
from moe_svd_distill.training.peers import Peers

OptimiserName: TypeAlias = Literal["muon", "adamw"]
_TINY = 1e-10
_TOGETHER = 1 << 24  # factors' entries whose steps are computed together, unless a stack alone has more


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
        mine = [
            block
            for number, block in enumerate(bank.blocks)
            if number // 2 % peers.count == peers.number  # A and B of a stack together: even shares
        ]
        self._groups = _alike(mine)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """As `Optimiser`."""
        bank, share = self._bank, 1 - self._momentum
        self._mean.lerp_(bank.gradient, share)
        ahead = torch.lerp(self._mean, bank.gradient, share)
        if self._decay:
            bank.values.mul_(1 - rate * self._decay)
        steps = torch.zeros_like(ahead) if self._peers.count > 1 else ahead
        for (rows, columns), blocks in self._groups:
            found = near_polar_factor(torch.cat([ahead[begin:end].view(-1, rows, columns) for begin, end in blocks]))
            found = found.mul_(adam_like_size(rows, columns)).reshape(-1)
            for (begin, end), step in zip(
                blocks, torch.split(found, [end - begin for begin, end in blocks]), strict=True
            ):
                steps[begin:end] = step
        self._peers.add_up(steps)
        bank.values.add_(steps, alpha=-rate)

    def tensors(self) -> dict[str, Tensor]:
        """As `Optimiser`."""
        return {"mean": self._mean}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """As `Optimiser`."""
        self._mean.copy_(tensors["mean"])


Group = tuple[tuple[int, int], list[tuple[int, int]]]
"""Rows and columns of some matrices, and where the stacks of them begin and end in the flat buffers."""


def _alike(blocks: Sequence[tuple[int, int, tuple[int, int, int]]]) -> list[Group]:
    """Stacks of matrices of one shape, as many together as one batched product may take."""
    groups: list[Group] = []
    open_groups: dict[tuple[int, int], tuple[Group, int]] = {}
    for begin, end, (_, rows, columns) in blocks:
        shape = rows, columns
        group, size = open_groups.get(shape, (None, 0))
        if group is None or size + end - begin > _TOGETHER:
            group, size = (shape, []), 0
            groups.append(group)
        group[1].append((begin, end))
        open_groups[shape] = group, size + end - begin
    return groups
