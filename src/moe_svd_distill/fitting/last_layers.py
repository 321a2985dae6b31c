"""The last decoder layers fitted together with the head, as LoRA factors, on what goes into them.

Their inputs were kept by the streamed pass, so a step runs these layers and nothing before them. The factors are moved
directly (a full change that is cut to a rank afterwards loses most of what it gained, docs/decisions/0012).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.algebra.optimiser_steps import adam_step
from moe_svd_distill.fitting.pairs import Segment, StatePairs
from moe_svd_distill.streaming import Decoder, LayerInputs, Matrix
from moe_svd_distill.streaming.states import slices

STEP_TOKENS = 512
BODY_RATE = 0.6  # over the width of the states: 5e-3 at 128, 3e-4 at 2048, where LoRA training commonly is


@dataclass(frozen=True, eq=False)
class RowSegment:
    """Sequences whose way through the last layers can be computed again.

    Attributes:
        ids: Token ids, (n, length).
        inputs: What the first of the last layers is given, of these sequences from `begin` on.
        begin: The first of these sequences among the recorded ones.
        teacher: All of the teacher's final states, (tokens, d_teacher).
        student_position: Flat positions in these sequences that are used, (places,), ascending.
        teacher_position: The teacher's beside them, (places,).
    """

    ids: NDArray[np.int64]
    inputs: LayerInputs
    begin: int
    teacher: Tensor
    student_position: NDArray[np.int64]
    teacher_position: NDArray[np.int64]

    def take(self, rows: slice) -> tuple[Tensor, list[Tensor]]:
        """Token ids and what was recorded for some of these sequences."""
        return torch.from_numpy(self.ids[rows]), self.inputs.rows(
            slice(self.begin + rows.start, self.begin + rows.stop)
        )


class Factors:
    """The LoRA pair of one stored matrix, with its moments; A begins as PEFT begins it and B at zero."""

    def __init__(self, weight: Matrix, rank: int, generator: torch.Generator) -> None:
        rows, columns = weight.value.shape
        self.weight, self.base = weight, weight.value.clone()
        device = self.base.device
        bound = 1 / math.sqrt(columns)
        self.first_a = ((torch.rand(rank, columns, generator=generator) * 2 - 1) * bound).to(device)
        self.a, self.b = self.first_a.clone(), torch.zeros(rows, rank, device=device)
        self.moments = {
            f"{side}.{kind}": torch.zeros_like(factor)
            for side, factor in (("a", self.a), ("b", self.b))
            for kind in ("mean", "square")
        }

    def apply(self, scale: float = 1.0) -> None:
        """Put W + scale·BA into the layer."""
        self.weight.value.copy_(torch.addmm(self.base, self.b, self.a, alpha=scale))

    def move(self, rate: float, step: int) -> None:
        """One step of both factors along the gradient by the weight; none where no gradient has reached it."""
        gradient = self.weight.gradient
        if gradient is None:
            return
        by_a, by_b = self.b.T @ gradient, gradient @ self.a.T
        for side, factor, slope in (("a", self.a, by_a), ("b", self.b, by_b)):
            mean, square = self.moments[f"{side}.mean"], self.moments[f"{side}.square"]
            adam_step(factor, slope, mean, square, rate, step)

    def reset(self) -> None:
        """Back to no change."""
        self.a.copy_(self.first_a)
        self.b.zero_()
        for moment in self.moments.values():
            moment.zero_()


class LayerSource:
    """A `fitting.source.Source` whose last layers move with the head.

    Attributes:
        factors: Hub name to the pair of the matrix.
        rate: Largest step of an entry of a factor.
    """

    def __init__(
        self,
        decoder: Decoder,
        fit: Sequence[RowSegment],
        check: RowSegment,
        width: int,
        ranks: dict[str, int],
        moment: Callable[[torch.device], Tensor],
        device: torch.device,
        seed: int,
    ) -> None:
        """Begin without any change.

        Args:
            decoder: With the last layers in memory, in float32.
            fit: Sequences to fit on.
            check: Sequences to check by.
            width: Of the student's states.
            ranks: Hub name to rank, for every matrix that moves.
            moment: Second moment of the student's states before the fit.
            device: Where the layers lie.
            seed: Of the first factors A.
        """
        self._decoder, self._fit, self._check_rows = decoder, tuple(fit), check
        self._first = check.inputs.layer
        self._device, self.moment = device, moment
        generator = torch.Generator().manual_seed(seed)
        self.factors = {
            matrix.name: Factors(matrix, min(ranks[matrix.name], *matrix.shape), generator)
            for matrix in decoder.matrices
            if matrix.name in ranks
        }
        for factors in self.factors.values():
            factors.weight.parameter.requires_grad_(True)
        self._rows = [(number, row) for number, segment in enumerate(self._fit) for row in range(len(segment.ids))]
        self._together = max(1, STEP_TOKENS // self._fit[0].ids.shape[1])
        self.batches = max(1, len(self._rows) // self._together)
        self._first_rate = self.rate = BODY_RATE / width

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """As `fitting.source.Source`."""
        return generator.permutation(len(self._rows))

    def begin(self, order: NDArray[np.int64], place: int) -> tuple[Tensor, Tensor]:
        """As `fitting.source.Source`; the layers run with gradients."""
        chosen = [self._rows[number] for number in order[place * self._together : (place + 1) * self._together]]
        ids, inputs, positions, theirs = [], [], [], []
        for offset, (number, row) in enumerate(chosen):
            segment = self._fit[number]
            length = segment.ids.shape[1]
            first, last = np.searchsorted(segment.student_position, (row * length, (row + 1) * length))
            some, recorded = segment.take(slice(row, row + 1))
            ids.append(some)
            inputs.append(recorded)
            positions.append(segment.student_position[first:last] + (offset - row) * length)
            theirs.append(segment.teacher[torch.from_numpy(segment.teacher_position[first:last])])
        with torch.enable_grad():
            states = self._through(torch.cat(ids), [torch.cat(tensors) for tensors in zip(*inputs, strict=True)])
            self._states = states[torch.from_numpy(np.concatenate(positions)).to(self._device)]
        return self._states, torch.cat(theirs).to(self._device, torch.float32)

    def end(self, gradient: Callable[[], Tensor], step: int, share: float) -> None:
        """As `fitting.source.Source`."""
        for factors in self.factors.values():
            factors.weight.parameter.grad = None
        torch.autograd.backward(self._states, gradient())
        del self._states
        for factors in self.factors.values():
            factors.move(self.rate * share, step)
            factors.apply()

    def check(self) -> StatePairs:
        """As `fitting.source.Source`."""
        return self.states_of(self._check_rows, 1.0)

    def states_of(self, rows: RowSegment, scale: float) -> StatePairs:
        """States of a text with this share of the change, at the places of `rows`."""
        for factors in self.factors.values():
            factors.apply(scale)
        with torch.no_grad():
            states = [
                self._through(*rows.take(block)).cpu()
                for block in slices(len(rows.ids), max(1, 2048 // rows.ids.shape[1]))
            ]
        for factors in self.factors.values():
            factors.apply()
        return StatePairs([Segment(torch.cat(states), rows.teacher, rows.student_position, rows.teacher_position)])

    def _through(self, ids: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Final states of some sequences, (tokens, d)."""
        wide = [
            tensor.to(self._device, torch.float32 if tensor.is_floating_point() else tensor.dtype) for tensor in inputs
        ]
        return self._decoder.states(ids.to(self._device), self._first, wide).flatten(0, 1)

    def tensors(self) -> dict[str, Tensor]:
        """As `fitting.source.Source`."""
        found: dict[str, Tensor] = {}
        for name, factors in self.factors.items():
            found |= {f"{name}#A": factors.a, f"{name}#B": factors.b}
            found |= {f"{name}#{kind}": moment for kind, moment in factors.moments.items()}
        return found

    def settle(self) -> None:
        """As `fitting.source.Source`."""
        for factors in self.factors.values():
            factors.apply()

    def pair(self, hub_name: str, rank: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(B, A)`` of a matrix as stored, (rows, rank) and (rank, columns), zeros beyond the fitted rank."""
        factors = self.factors[hub_name]
        lacking = rank - len(factors.a)
        left = torch.nn.functional.pad(scale * factors.b, (0, lacking))
        right = torch.nn.functional.pad(factors.a, (0, 0, 0, lacking))
        return left.to("cpu", dtype), right.to("cpu", dtype)

    def reset(self, halvings: int) -> None:
        """As `fitting.source.Source`."""
        self.rate = self._first_rate / 2**halvings
        for factors in self.factors.values():
            factors.reset()
            factors.apply()
