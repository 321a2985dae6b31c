"""How far a student's distribution is from its teacher's, and the gradient by the student's logits.

With p the teacher's distribution, q the student's and ``q = softmax(z)``:

- forward, KL(p‖q): ``∂z = q − p``
- reverse, KL(q‖p): ``∂z = q ∘ (log(q/p) − KL(q‖p))``
- Jensen–Shannon with m = (p+q)/2, ½ KL(p‖m) + ½ KL(q‖m): ``∂z = ½ q ∘ (log(q/m) − KL(q‖m))``
- cross-entropy with the token that follows: ``∂z = q − e``

They are the ones of generalised knowledge distillation (Agarwal et al., arXiv 2306.13649, with β = ½).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

Divergence: TypeAlias = Literal["forward", "reverse", "jensen-shannon"]


def divergence_and_gradient(
    teacher: Float[Tensor, "n v"],
    student: Float[Tensor, "n v"],
    kind: Divergence = "forward",
    following: Int[Tensor, " n"] | None = None,
    cross_entropy_share: float = 0.0,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n v"]]:
    """The loss of each row in nats, and its gradient by the student's logits.

    Args:
        teacher: Logits.
        student: Logits.
        kind: Which divergence.
        following: The token that follows each row, or -1 where none does; needed for a share of cross-entropy.
        cross_entropy_share: λ in ``(1 − λ) · divergence + λ · cross-entropy``; rows without a token have the divergence
            alone.
    """
    loss, gradient = _KINDS[kind](teacher, student)
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


_KINDS = {"forward": _forward, "reverse": _reverse, "jensen-shannon": _jensen_shannon}
