"""A head that stands still, for texts with rows of `expected_rows` in the place of the teacher's states."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_svd_distill.algebra.dtypes import matmul_dtype
from moe_svd_distill.streaming import Head
from moe_svd_distill.training.head import LOGIT_BYTES
from moe_svd_distill.training.text import Batch

_LARGE = 1 << 24  # entries of a head from which on the products with it are most of a step


class FixedHead:
    """As `TrainedHead`, without anything that moves, and for the forward divergence alone.

    Products with a large head are in bfloat16 where the device multiplies it in hardware; sums are in float32.

    Attributes:
        weights: The head.
        products: Its weight in the type of the products.
        values: Nothing.
        gradient: Nothing.
        loss: As of `TrainedHead`.
    """

    def __init__(self, student: Head) -> None:
        """The head over the common tokens; where its weight lies is where this computes."""
        self.weights = student
        weight = student.weight
        large = weight.numel() >= _LARGE
        self.products = weight.to(matmul_dtype(weight.device)) if large else weight
        self.values = self.gradient = weight.new_zeros(0)
        self.loss = torch.zeros((), dtype=torch.float64)

    def forget(self) -> None:
        """Nothing: the head stays."""

    def head(self) -> Head:
        """The head."""
        return self.weights

    @torch.no_grad()
    def divergence(self, states: Tensor, batch: Batch) -> Tensor:
        """As `TrainedHead`, to the rounding of the products."""
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        for part in self._parts(len(states)):
            inputs, rows = states[part].float(), batch.teacher[part]
            total += self._loss(self._logits(inputs), inputs, rows).double().sum()
        return total

    @torch.no_grad()
    def learn(self, states: Tensor, batch: Batch, places: int) -> Tensor:
        """As `TrainedHead`."""
        slopes = []
        for part in self._parts(len(states)):
            inputs, rows = states[part].float(), batch.teacher[part]
            logits = self._logits(inputs)
            self.loss += self._loss(logits, inputs, rows).double().sum().cpu() / places
            found = torch.softmax(logits, dim=-1).to(self.products.dtype) @ self.products
            slope = found.float().mul_(self.weights.transform.multiplier)
            slopes.append(slope.sub_(rows[:, :-1]).div_(places))
        return torch.cat(slopes)

    @torch.no_grad()
    def figures(self, states: Tensor, rows: Tensor, best: Tensor, target: Tensor) -> Tensor:
        """KL, cross-entropy and agreement at single places, (3, n), to the rounding of the products.

        Args:
            states: The student's, (n, d).
            rows: From `expected_rows`, (n, d + 1).
            best: The teacher's most likely token, (n,).
            target: The token that follows, (n,).
        """
        device, columns = self.products.device, []
        for part in self._parts(len(states)):
            inputs, expected = states[part].to(device, torch.float32), rows[part].to(device)
            logits = self._logits(inputs)
            entropy = torch.logsumexp(logits, dim=-1) - logits.gather(1, target[part].to(device)[:, None])[:, 0]
            agreement = logits.argmax(dim=-1) == best[part].to(device)
            columns.append(torch.stack([self._loss(logits, inputs, expected), entropy, agreement.float()]).cpu())
        return torch.cat(columns, dim=1)

    def _logits(self, inputs: Tensor) -> Tensor:
        found = (inputs.to(self.products.dtype) @ self.products.T).float()
        return self.weights.transform(found if self.weights.bias is None else found.add_(self.weights.bias))

    def _parts(self, count: int) -> list[slice]:
        step = max(1, LOGIT_BYTES // (4 * len(self.products)))
        return [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]

    @staticmethod
    def _loss(logits: Tensor, inputs: Tensor, rows: Tensor) -> Tensor:
        return torch.logsumexp(logits, dim=-1) - torch.linalg.vecdot(inputs, rows[:, :-1]) + rows[:, -1]
