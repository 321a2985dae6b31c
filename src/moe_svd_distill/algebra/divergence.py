"""How far a student's distribution is from its teacher's, for each token and document, and the gradient by its logits.

What measures takes logits of any floating type and works in float32 on a few tokens at a time, so that no float32 copy
of all logits is held.

With p the teacher's distribution, q the student's and ``q = softmax(z)``:

- forward, KL(p‖q): ``∂z = q − p``
- reverse, KL(q‖p): ``∂z = q ∘ (log(q/p) − KL(q‖p))``
- Jensen–Shannon with m = (p+q)/2, ½ KL(p‖m) + ½ KL(q‖m): ``∂z = ½ q ∘ (log(q/m) − KL(q‖m))``
- skewed, KL(p‖m) with m = αp + (1−α)q and α = 0.1 (Ko et al., arXiv 2402.03898): with ``g = −(1−α) p/m``,
  ``∂z = q ∘ (g − Σ q g)``; bounded where the student gives a token next to nothing
- cross-entropy with the token that follows: ``∂z = q − e``

The first three are those of generalised knowledge distillation (Agarwal et al., arXiv 2306.13649, with β = ½).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.algebra.figures import Measurement

CHUNK_ENTRIES = 1 << 22  # logits turned into float32 at a time: 16 MiB


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does to the head's output: logits = cap · tanh(multiplier · x / cap)."""

    multiplier: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply it, (tokens, vocabulary) to the same."""
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def pull_back(self, gradient: Float[Tensor, "n v"], logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """The gradient by the head's output from the gradient by the logits that came of it."""
        if self.cap is not None:
            gradient = gradient * (1.0 - (logits / self.cap) ** 2)
        return gradient * self.multiplier if self.multiplier != 1.0 else gradient


_SKEW = 0.1


def divergence_and_gradient(
    teacher: Float[Tensor, "n v"],
    student: Float[Tensor, "n v"],
    kind: str = "forward",
    following: Int[Tensor, " n"] | None = None,
    cross_entropy_share: float = 0.0,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n v"]]:
    """The loss of each row in nats, and its gradient by the student's logits.

    Args:
        teacher: Logits.
        student: Logits.
        kind: Which of `DIVERGENCES`.
        following: The token that follows each row, or -1 where none does; needed for a share of cross-entropy.
        cross_entropy_share: λ in ``(1 − λ) · divergence + λ · cross-entropy``; rows without a token have the divergence
            alone.
    """
    loss, gradient = DIVERGENCES[kind](teacher, student)
    if cross_entropy_share == 0.0 or following is None:
        return loss, gradient
    real = following >= 0
    target = following.clamp_min(0)[:, None]
    log_q = torch.log_softmax(student, dim=-1)
    entropy = -log_q.gather(1, target)[:, 0]
    hard = log_q.exp().scatter_add(1, target, torch.full_like(target, -1, dtype=log_q.dtype))
    share = torch.where(real, cross_entropy_share, 0.0).to(loss)
    return (1 - share) * loss + share * entropy, gradient.mul_((1 - share)[:, None]).add_(hard.mul_(share[:, None]))


def _forward(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    # Two exponentials instead of four: with lse the logarithm of a row's sum, KL = Σ p (t − s) − lse(t) + lse(s).
    p, q = torch.softmax(teacher, dim=-1), torch.softmax(student, dim=-1)
    loss = torch.linalg.vecdot(p, teacher - student) - _log_sum(teacher, p) + _log_sum(student, q)
    return loss, q.sub_(p)


def _log_sum(logits: Tensor, probabilities: Tensor) -> Tensor:
    """``log Σ exp`` of each row, from its softmax at the most likely token, where nothing is lost to rounding."""
    largest, place = logits.max(dim=-1, keepdim=True)
    return (largest - probabilities.gather(-1, place).log())[:, 0]


def _reverse(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    log_p, log_q = torch.log_softmax(teacher, dim=-1), torch.log_softmax(student, dim=-1)
    q, ratio = log_q.exp(), log_q - log_p
    loss = (q * ratio).sum(dim=-1)
    return loss, q.mul_(ratio.sub_(loss[:, None]))


def _jensen_shannon(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    log_p, log_q = torch.log_softmax(teacher, dim=-1), torch.log_softmax(student, dim=-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0)).to(log_q)
    p, q = log_p.exp(), log_q.exp()
    to_teacher, ratio = (p * (log_p - log_m)).sum(dim=-1), log_q - log_m
    to_student = (q * ratio).sum(dim=-1)
    return (to_teacher + to_student) / 2, q.mul_(ratio.sub_(to_student[:, None])).div_(2)


def _skewed(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    p, q = torch.softmax(teacher, dim=-1), torch.softmax(student, dim=-1)
    mixed = _SKEW * p + (1 - _SKEW) * q
    loss = (p * (torch.log_softmax(teacher, dim=-1) - mixed.log())).sum(dim=-1)
    slope = p.div_(mixed).mul_(_SKEW - 1)
    return loss, slope.sub_(torch.linalg.vecdot(q, slope)[:, None]).mul_(q)


DIVERGENCES = {"forward": _forward, "reverse": _reverse, "jensen-shannon": _jensen_shannon, "skewed": _skewed}
"""By name, as in recipes: logits of teacher and student to the loss of each row and its gradient."""


def kl_divergence(
    teacher_logits: Float[Tensor, "tokens vocabulary"], student_logits: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, "tokens"]:
    """``KL(teacher || student) = sum_v p_T (log p_T - log p_S)`` of every token, in nats, never below zero.

    Words the teacher rules out (logit -inf) contribute nothing, whatever the student says.
    """
    parts = []
    for rows in _chunks(teacher_logits):
        teacher = torch.log_softmax(teacher_logits[rows].float(), dim=-1)
        student = torch.log_softmax(student_logits[rows].float(), dim=-1)
        probability = teacher.exp()
        difference = torch.where(probability > 0, teacher - student, torch.zeros_like(teacher))
        parts.append((probability * difference).sum(-1).clamp_min(0.0))
    return torch.cat(parts)


def cross_entropy(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, "tokens"]
) -> Float[Tensor, "tokens"]:
    """``-log p(target)`` of every token, in nats."""
    parts = []
    for rows in _chunks(logits):
        chunk = logits[rows].float()
        chosen = chunk.gather(-1, targets[rows].long()[:, None]).squeeze(-1)
        parts.append(torch.logsumexp(chunk, dim=-1) - chosen)
    return torch.cat(parts)


def top1_agreement(
    teacher_logits: Float[Tensor, "tokens vocabulary"], student_logits: Float[Tensor, "tokens vocabulary"]
) -> Bool[Tensor, "tokens"]:
    """Whether both put the same word first, for every token."""
    return teacher_logits.argmax(-1) == student_logits.argmax(-1)


@torch.no_grad()
def measure_tokens(chunks: Iterable[tuple[Tensor, Tensor, Tensor]], units: NDArray[np.int64]) -> Measurement:
    """KL, cross-entropy and agreement, summed for each document.

    Args:
        chunks: Logits of teacher and student, (tokens, vocabulary), and the tokens that follow, (tokens,). Where both
            logits are the same tensor, their comparison is spared.
        units: The document of every token, in their order.
    """
    columns = []
    for wanted, given, targets in chunks:
        entropy = cross_entropy(given, targets)
        kl, agreement = (
            (torch.zeros_like(entropy), torch.ones_like(entropy))
            if wanted is given
            else (kl_divergence(wanted, given), top1_agreement(wanted, given).to(entropy))
        )
        columns.append(torch.stack([kl, entropy, agreement]).cpu())
    return Measurement.of_tokens(torch.cat(columns, dim=1).double().numpy(), units)


def _chunks(logits: Float[Tensor, "tokens vocabulary"]) -> Iterator[slice]:
    tokens, vocabulary = logits.shape
    step = max(1, CHUNK_ENTRIES // max(1, vocabulary))
    for start in range(0, max(1, tokens), step):
        yield slice(start, start + step)
