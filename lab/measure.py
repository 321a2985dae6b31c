"""Held-out figures of saved models, loaded from their folders in float32: cross-entropy, KL and agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lab.corpus import Document
from lab.plan import CONTEXT
from lab.tokenizer import encode, load_tokenizer

_BATCH = 8


@dataclass(frozen=True)
class Figures:
    """A pair's figures in nats per token, and the share of tokens where both models' best guess is the same."""

    teacher_cross_entropy: float
    student_cross_entropy: float
    kl: float
    top1_agreement: float
    tokens: int

    @property
    def gap(self) -> float:
        """How many nats the student is behind."""
        return self.student_cross_entropy - self.teacher_cross_entropy


def load_model(folder: Path) -> PreTrainedModel:
    """Load a saved model in float32, ready for evaluation."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def heldout_windows(folder: Path, documents: Sequence[Document], limit: int | None = None) -> torch.Tensor:
    """Encode documents with the tokenizer of a model folder into full windows, (windows, CONTEXT)."""
    tokens = encode(load_tokenizer(folder), documents)
    windows = torch.from_numpy(tokens[: len(tokens) // CONTEXT * CONTEXT].astype("int64")).view(-1, CONTEXT)
    return windows[:limit]


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities of the next token at every position but the last, (windows, CONTEXT - 1, V)."""
    return model(input_ids=windows).logits[:, :-1].float().log_softmax(-1)


def cross_entropy(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Mean cross-entropy over all predicted tokens."""
    total = 0.0
    for part in windows.split(_BATCH):
        scores = log_probabilities(model, part)
        total -= scores.gather(-1, part[:, 1:, None]).double().sum().item()
    return total / (windows.shape[0] * (CONTEXT - 1))


def compare(teacher: PreTrainedModel, student: PreTrainedModel, windows: torch.Tensor) -> Figures:
    """Measure a pair on the same windows."""
    sums = torch.zeros(4, dtype=torch.float64)
    for part in windows.split(_BATCH):
        of_teacher, of_student = log_probabilities(teacher, part), log_probabilities(student, part)
        targets = part[:, 1:, None]
        sums += torch.stack(
            [
                -of_teacher.gather(-1, targets).double().sum(),
                -of_student.gather(-1, targets).double().sum(),
                (of_teacher.exp() * (of_teacher - of_student)).double().sum(),
                (of_teacher.argmax(-1) == of_student.argmax(-1)).double().sum(),
            ]
        )
    count = windows.shape[0] * (CONTEXT - 1)
    teacher_ce, student_ce, kl, agreement = (sums / count).tolist()
    return Figures(teacher_ce, student_ce, kl, agreement, count)
