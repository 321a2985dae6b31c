"""What the teacher's distributions mean to a head that stands still: one row of numbers per place.

With p the teacher's distribution, W and b the student's head and ``z = W h + b``, forward KL is
``Σ p log p + log Σ exp z − h · (Wᵀ p) − b · p``, and a share of cross-entropy only moves p towards the token that
follows. So ``Wᵀ p`` and a number are all that the loss needs of the teacher: they are computed once, before training,
and later passes over the text leave out the teacher's head.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.streaming import Head
from moe_svd_distill.training.head import LOGIT_BYTES
from moe_svd_distill.training.text import TrainingText


@dataclass(frozen=True, eq=False)
class ExpectedText:
    """A text, and what the teacher expects at its places.

    Attributes:
        text: With rows of `expected_rows` in the place of the teacher's states.
        best: The teacher's most likely token at each place, among the common ones, (places,).
    """

    text: TrainingText
    best: Tensor


def expected_rows(
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


@contextmanager
def with_expected_rows(
    text: TrainingText,
    teacher_head: Head,
    student_head: Head,
    share: float,
    folder: Path,
    name: str,
    dtype: torch.dtype = torch.float32,
) -> Iterator[ExpectedText]:
    """The text with such rows in the place of the teacher's states, in a file that is gone when this closes.

    Every process of a run computes all of them: a row is as cheap as a place in one pass of training.

    Args:
        text: With the teacher's states.
        teacher_head: Over the common tokens.
        student_head: The same; where its weight lies is where this computes.
        share: Of the cross-entropy in the loss.
        folder: Where the file lies.
        name: Of the file; no two processes or texts may have the same.
        dtype: Type of the products with both heads.
    """
    device, width = student_head.weight.device, student_head.weight.shape[1] + 1
    count = len(text.position)
    step = max(1, LOGIT_BYTES // (4 * len(student_head.weight)))
    theirs, mine = teacher_head.weight.to(dtype), student_head.weight.to(dtype)
    best = torch.empty(count, dtype=torch.int64)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"expected-rows-{name}-", dir=folder) as scratch:
        rows = torch.from_file(str(Path(scratch) / "rows"), shared=True, size=count * width, dtype=torch.float32)
        rows = rows.view(count, width)
        for begin in range(0, count, step):
            part = slice(begin, min(begin + step, count))
            states = text.teacher[torch.from_numpy(text.teacher_position[part])].to(device, dtype)
            logits = torch.nn.functional.linear(states, theirs).float()
            logits = teacher_head.transform(logits if teacher_head.bias is None else logits.add_(teacher_head.bias))
            following = torch.from_numpy(text.following[part]).to(device)
            rows[part] = expected_rows(logits, following, student_head, share, mine).cpu()
            best[part] = logits.argmax(dim=-1).cpu()
        yield ExpectedText(replace(text, teacher_position=np.arange(count), teacher=rows), best)
