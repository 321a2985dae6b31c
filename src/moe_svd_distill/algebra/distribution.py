"""How far two next-token distributions are apart, token by token and by document, in nats.

All functions take logits of any floating type and work in float32 on a few tokens at a time, so that no float32 copy of
all logits is held.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.algebra.figures import Measurement

CHUNK_ENTRIES = 1 << 22  # logits turned into float32 at a time: 16 MiB


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
