"""What moves the factors and the head along their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from moe_svd_distill.algebra.orthogonal_step import adam_like_size, near_polar_factor
from moe_svd_distill.training.lora_pairs import Block
from moe_svd_distill.training.lora_parameters import LoraParameters
from moe_svd_distill.training.process_group import ProcessGroup

if TYPE_CHECKING:
    from moe_svd_distill.training.fixed_head import FixedHead
    from moe_svd_distill.training.head import TrainedHead
    from moe_svd_distill.training.settings import TrainingSettings

_TINY = 1e-10
_TOGETHER = 1 << 24  # factors' entries whose steps are computed together, unless a stack alone has more


class Optimiser(Protocol):
    """Moves values in place."""

    def step(self, rate: float) -> None:
        """Move along the gradient that lies beside the values; it may be overwritten."""

    def tensors(self) -> dict[str, Tensor]:
        """What must be on the disk to go on from here."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from there."""


class AdamW:
    """torch's own AdamW on a flat tensor, parts of which may move at rates of their own."""

    def __init__(
        self,
        values: Tensor,
        gradient: Tensor,
        betas: tuple[float, float],
        weight_decay: float,
        blocks: Sequence[Block] = (),
    ) -> None:
        """Begin at zero.

        Args:
            values: Flat, moved in place.
            gradient: Of the same length, filled before each step.
            betas: Decay of the two moments.
            weight_decay: Decoupled.
            blocks: What lies in it; without any all of it moves at one rate.
        """
        self._parts: list[tuple[float, Tensor]] = []
        for begin, end, rate in _of_one_rate(blocks) or [(0, len(values), 1.0)]:
            part = values[begin:end]
            part.grad = gradient[begin:end]
            self._parts.append((rate, part))
        groups: list[dict[str, Any]] = [{"params": [part]} for _, part in self._parts]
        self._adamw = torch.optim.AdamW(groups, betas=betas, eps=_TINY, weight_decay=weight_decay, fused=True)

    def step(self, rate: float) -> None:
        """As `Optimiser`."""
        for group, (share, _) in zip(self._adamw.param_groups, self._parts, strict=True):
            group["lr"] = rate * share
        self._adamw.step()

    def tensors(self) -> dict[str, Tensor]:
        """As `Optimiser`."""
        return {
            f"{number}.{name}": tensor
            for number, (_, part) in enumerate(self._parts)
            for name, tensor in self._adamw.state[part].items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """As `Optimiser`."""
        for number, (_, part) in enumerate(self._parts):
            prefix = f"{number}."
            self._adamw.state[part] = {
                name.removeprefix(prefix): tensor.clone().to(part.device)
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }


class Muon:
    """Steps of equal size in all directions of each factor, from Nesterov momentum."""

    def __init__(self, bank: LoraParameters, momentum: float, weight_decay: float, group: ProcessGroup) -> None:
        """Begin at zero.

        Args:
            bank: Whose factors move.
            momentum: Decay of the mean gradient.
            weight_decay: Decoupled.
            group: Each computes the steps of some factors and is told those of the others.
        """
        self._bank, self._momentum, self._decay, self._group = bank, momentum, weight_decay, group
        self._mean = torch.zeros_like(bank.values)
        self._groups = _alike(_shares(bank.blocks, group.count)[group.number])

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """As `Optimiser`."""
        bank, momentum = self._bank, self._momentum
        self._mean.lerp_(bank.gradient, 1 - momentum)
        # In the gradient's place, which saves a buffer: each step fills it anew.
        ahead = bank.gradient.lerp_(self._mean, momentum)
        if self._decay:
            bank.values.mul_(1 - rate * self._decay)
        steps = torch.zeros_like(ahead) if self._group.count > 1 else ahead
        for blocks in self._groups:
            found = near_polar_factor(torch.cat([block.of(ahead) for block in blocks]))
            found = found.mul_(blocks[0].rate * adam_like_size(blocks[0].rows, blocks[0].columns))
            for block, step in zip(blocks, torch.split(found, [block.count for block in blocks]), strict=True):
                block.of(steps).copy_(step)
        self._group.add_up(steps)
        bank.values.add_(steps, alpha=-rate)

    def tensors(self) -> dict[str, Tensor]:
        """As `Optimiser`."""
        return {"mean": self._mean}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """As `Optimiser`."""
        self._mean.copy_(tensors["mean"])


def make_optimisers(
    bank: LoraParameters, head: TrainedHead | FixedHead, settings: TrainingSettings, group: ProcessGroup
) -> dict[str, tuple[Optimiser, float]]:
    """Of the factors and of the head, each with its rate, for what of them moves."""
    found: dict[str, tuple[Optimiser, float]] = {}
    if bank.values.numel():
        decay = settings.weight_decay
        factors = (
            Muon(bank, settings.momentum, decay, group)
            if settings.optimiser == "muon"
            else AdamW(bank.values, bank.gradient, settings.betas, decay, bank.blocks)
        )
        found["factors"] = factors, settings.rate
    if head.values.numel():
        found["head"] = AdamW(head.values, head.gradient, settings.betas, 0.0), settings.head_rate
    return found


def _alike(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks of matrices of one shape and rate, as many together as one batched product may take."""
    groups: list[list[Block]] = []
    latest: dict[tuple[int, int, float], list[Block]] = {}
    for block in blocks:
        kind = block.rows, block.columns, block.rate
        group = latest.get(kind)
        if group is None or sum(other.end - other.begin for other in (*group, block)) > _TOGETHER:
            group = latest[kind] = []
            groups.append(group)
        group.append(block)
    return groups


def _shares(blocks: Sequence[Block], count: int) -> list[list[Block]]:
    """The blocks dealt out to so many processes, each time to the one with the least work so far."""
    shares: list[list[Block]] = [[] for _ in range(count)]
    work = [0] * count
    for block in blocks:
        least = work.index(min(work))
        shares[least].append(block)
        work[least] += (block.end - block.begin) * min(block.rows, block.columns)
    return shares


def _of_one_rate(blocks: Sequence[Block]) -> list[tuple[int, int, float]]:
    """Beginning, end and rate of the stretches of blocks with one rate each."""
    stretches: list[tuple[int, int, float]] = []
    for block in blocks:
        if stretches and stretches[-1][2] == block.rate:
            stretches[-1] = stretches[-1][0], block.end, block.rate
        else:
            stretches.append((block.begin, block.end, block.rate))
    return stretches
