"""A head that stands still, and what the teacher's distributions mean to it: one row of numbers per place.

With p the teacher's distribution, W and b the student's head and ``z = W h + b``, forward KL is
``Σ p log p + log Σ exp z − h · (Wᵀ p) − b · p``, and a share of cross-entropy only moves p towards the token that
follows. So ``Wᵀ p`` and a number are all that the loss needs of the teacher: they are computed once, before training,
and later passes over the text leave out the teacher's head.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.algebra.dtypes import matmul_dtype
from moe_svd_distill.streaming import Head
from moe_svd_distill.streaming.states_file import slices
from moe_svd_distill.training.head import LOGIT_BYTES
from moe_svd_distill.training.text import Batch, TrainingText

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

    def reset_to_zero(self) -> None:
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
    def accumulate_gradients(self, states: Tensor, batch: Batch, places: int) -> Tensor:
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
            rows: From `teacher_expectations`, (n, d + 1).
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

    @contextmanager
    def with_expectations(
        self,
        text: TrainingText,
        teacher: Head,
        share: float,
        folder: Path,
        name: str,
        on_share: Callable[[float], None] = lambda share: None,
    ) -> Iterator[tuple[TrainingText, Tensor]]:
        """The text with rows of `teacher_expectations` for the teacher's states, in a file that is gone at the end.

        Every process of a run computes all of them: a row is as cheap as a place in one pass of training.

        Args:
            text: With the teacher's states.
            teacher: The teacher's head over the common tokens.
            share: Of the cross-entropy in the loss.
            folder: Where the file lies.
            name: Of the file; no two processes or texts may have the same.
            on_share: Told how much of it is done, from 0 to 1.

        Yields:
            The text, and the teacher's most likely token at each place, among the common ones, (places,).
        """
        device, count, width = self.products.device, len(text.position), self.products.shape[1] + 1
        theirs = teacher.weight.to(self.products.dtype)
        best = torch.empty(count, dtype=torch.int64)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"expected-rows-{name}-", dir=folder) as scratch:
            rows = torch.from_file(str(Path(scratch) / "rows"), shared=True, size=count * width, dtype=torch.float32)
            rows = rows.view(count, width)
            for part in self._parts(count):
                on_share(part.start / count)
                states = text.teacher[torch.from_numpy(text.teacher_position[part])].to(device, theirs.dtype)
                logits = torch.nn.functional.linear(states, theirs).float()
                logits = teacher.transform(logits if teacher.bias is None else logits.add_(teacher.bias))
                following = torch.from_numpy(text.following[part]).to(device)
                rows[part] = teacher_expectations(logits, following, self.weights, share, self.products).cpu()
                best[part] = logits.argmax(dim=-1).cpu()
            yield replace(text, teacher_position=np.arange(count), teacher=rows), best

    def _logits(self, inputs: Tensor) -> Tensor:
        found = (inputs.to(self.products.dtype) @ self.products.T).float()
        return self.weights.transform(found if self.weights.bias is None else found.add_(self.weights.bias))

    def _parts(self, count: int) -> Iterator[slice]:
        return slices(count, max(1, LOGIT_BYTES // (4 * len(self.products))))

    @staticmethod
    def _loss(logits: Tensor, inputs: Tensor, rows: Tensor) -> Tensor:
        return torch.logsumexp(logits, dim=-1) - torch.linalg.vecdot(inputs, rows[:, :-1]) + rows[:, -1]


def teacher_expectations(
    logits: Tensor, following: Tensor, student_head: Head, share: float, products: Tensor | None = None
) -> Tensor:
    """The rows of some places.

    Args:
        logits: The teacher's over the common tokens, (n, v).
        following: The token that follows each place; -1 where none does, (n,).
        student_head: Over the same tokens; it must not bend its logits.
        share: Of the cross-entropy in the loss.
        products: The student's weight in the type to multiply in; by default as it is.

    Returns:
        ``Wᵀ p`` and, last, ``(1 − share) Σ p log p − b · p``, (n, d_student + 1); p is already mixed with the tokens.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    p = log_p.exp()
    constant = (p * log_p).sum(dim=-1)
    if share:
        real = torch.where(following >= 0, share, 0.0).to(p)
        constant *= 1 - real
        p.mul_((1 - real)[:, None]).scatter_add_(1, following.clamp_min(0)[:, None], real[:, None])
    multiplier = student_head.transform.multiplier
    if student_head.bias is not None:
        constant -= multiplier * (p @ student_head.bias)
    weight = student_head.weight if products is None else products
    return torch.cat([(p.to(weight.dtype) @ weight).float() * multiplier, constant[:, None]], dim=1)
