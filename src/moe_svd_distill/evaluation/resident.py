"""Figures of models that fit in memory, without ever holding the logits of more than a few hundred tokens.

The teacher runs once. What is kept of it are its final hidden states and its head: its exact distribution is recomputed
from these, chunk by chunk, whenever a student is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.algebra.distribution import cross_entropy, kl_divergence, top1_agreement
from moe_svd_distill.calibration.text import IntArray, TokenizedText
from moe_svd_distill.errors import BadDataError, IncompatiblePairError
from moe_svd_distill.evaluation.figures import FloatArray, Measurement

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the name of a pass, the tokens done and the tokens to do."""

CHUNK_TOKENS = 512
BATCH_TOKENS = 2048
_PROBE_TOKENS = 16


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


@dataclass(frozen=True, eq=False)
class TeacherRecord:
    """All that is kept of the teacher after its one pass.

    Attributes:
        hidden: Final hidden states after the last norm, at every position that predicts, (n, length-1, d); on the CPU.
        weight: The head, float32, (V, d).
        bias: The head's bias, float32, (V,), or None.
        transform: What follows the head.
        vocabulary: Tokens the distributions are taken over; the first this many.
        measurement: The teacher's own figures on the text (KL 0, agreement 1).
        text: The text it read.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform
    vocabulary: int
    measurement: Measurement
    text: TokenizedText

    def logits(self, hidden: Tensor) -> Tensor:
        """The teacher's logits from its hidden states, (tokens, d) to (tokens, vocabulary), on the head's device."""
        bias = None if self.bias is None else self.bias[: self.vocabulary]
        states = hidden.to(self.weight.device, torch.float32)
        return self.transform(torch.nn.functional.linear(states, self.weight[: self.vocabulary], bias))


@torch.no_grad()
def record_teacher(
    model: Any, text: TokenizedText, *, vocabulary: int | None = None, on_progress: Progress | None = None
) -> TeacherRecord:
    """Run the teacher over the text once. The model can be deleted afterwards; its head lives on in the record.

    Args:
        model: A transformers causal language model.
        text: What to read.
        vocabulary: Compare only the first this many tokens; by default all the head has.
        on_progress: Told about every batch.
    """
    head, transform = _checked_head(model)
    weight = head.weight.detach().float()
    bias = getattr(head, "bias", None)
    bias = None if bias is None else bias.detach().float()
    size = weight.shape[0] if vocabulary is None else min(vocabulary, weight.shape[0])
    kept: list[Tensor] = []
    sums = _Sums(text)
    for rows, states in _hidden_states(model, text, "teacher", on_progress):
        kept.append(states.cpu())
        for part, targets in _chunks(states, text, rows):
            output = torch.nn.functional.linear(part.float(), weight[:size], None if bias is None else bias[:size])
            logits = transform(output)
            zeros = torch.zeros(len(part))
            sums.add(zeros, cross_entropy(logits, targets.to(logits.device)), zeros + 1)
    return TeacherRecord(torch.cat(kept), weight, bias, transform, size, sums.measurement(), text)


@torch.no_grad()
def measure(
    model: Any, teacher: TeacherRecord, *, name: str = "student", on_progress: Progress | None = None
) -> Measurement:
    """Measure a student, with or without an adapter around its layers, on the text the teacher has read.

    Args:
        model: A transformers causal language model (of a PEFT model: `get_base_model()`).
        teacher: The record of the teacher's pass.
        name: What to call this pass in `on_progress`.
        on_progress: Told about every batch.
    """
    head, transform = model.get_output_embeddings(), _transform(model)
    text, sums = teacher.text, _Sums(teacher.text)
    for rows, states in _hidden_states(model, text, name, on_progress):
        recorded = teacher.hidden[rows].flatten(0, 1)
        for index, (part, targets) in enumerate(_chunks(states, text, rows)):
            logits = transform(head(part))
            if logits.shape[-1] < teacher.vocabulary:
                raise IncompatiblePairError(
                    f"The student's head has {logits.shape[-1]} tokens, fewer than the {teacher.vocabulary} to compare",
                    "Compare only the tokens both models have",
                )
            logits = logits[:, : teacher.vocabulary].float()
            wanted = teacher.logits(recorded[index * CHUNK_TOKENS :][: len(part)]).to(logits.device)
            sums.add(
                kl_divergence(wanted, logits),
                cross_entropy(logits, targets.to(logits.device)),
                top1_agreement(wanted, logits),
            )
    measurement = sums.measurement()
    if not np.isfinite(measurement.kl).all():
        raise BadDataError(
            f"The figures of the {name} are not finite", "Check the adapter for NaN: moe-svd-distill verify"
        )
    return measurement


class _Sums:
    """Adds up figures by document, token after token in the order of the text."""

    def __init__(self, text: TokenizedText) -> None:
        _, units = np.unique(text.units()[:, 1:].reshape(-1), return_inverse=True)
        self.units: IntArray = units
        self.values: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, kl: Tensor, entropy: Tensor, agreement: Tensor) -> None:
        self.values.append((kl.cpu(), entropy.cpu(), agreement.cpu()))

    def measurement(self) -> Measurement:
        kl, entropy, agreement = (self._by_document(column) for column in zip(*self.values, strict=True))
        return Measurement(kl, entropy, agreement, np.bincount(self.units).astype(np.float64))

    def _by_document(self, parts: Sequence[Tensor]) -> FloatArray:
        return np.bincount(self.units, weights=torch.cat(list(parts)).double().numpy()).astype(np.float64)


@torch.no_grad()
def _hidden_states(
    model: Any, text: TokenizedText, name: str, on_progress: Progress | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a batch of sequences and their final hidden states, (rows, length-1, d)."""
    decoder, device = model.get_decoder(), model.device
    sequences = torch.from_numpy(np.ascontiguousarray(text.sequences))
    step = max(1, BATCH_TOKENS // text.length)
    if on_progress:
        on_progress(name, 0, text.tokens)
    for begin in range(0, len(sequences), step):
        rows = slice(begin, begin + step)
        batch = sequences[rows].to(device)
        yield rows, decoder(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
        if on_progress:
            on_progress(name, begin * text.length + batch.numel(), text.tokens)


def _chunks(states: Tensor, text: TokenizedText, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield hidden states (tokens, d) and the tokens that follow (tokens,), a chunk at a time."""
    targets = torch.from_numpy(np.ascontiguousarray(text.sequences[rows, 1:])).flatten()
    flat = states.flatten(0, 1)
    for begin in range(0, len(flat), CHUNK_TOKENS):
        chunk = slice(begin, begin + CHUNK_TOKENS)
        yield flat[chunk], targets[chunk]


def _transform(model: Any) -> LogitTransform:
    config = model.config.get_text_config()
    multiplier = getattr(config, "logit_scale", None) or 1.0
    multiplier /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(float(multiplier), getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _checked_head(model: Any) -> tuple[Any, LogitTransform]:
    """Return the head and what follows it, checked on a few tokens to give the model's own logits."""
    head, transform = model.get_output_embeddings(), _transform(model)
    probe = torch.arange(_PROBE_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    expected = model(input_ids=probe, use_cache=False).logits[0].float()
    states = model.get_decoder()(input_ids=probe, use_cache=False).last_hidden_state[0]
    found = transform(head(states)).float()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        raise BadDataError(
            f"The head of {type(model).__name__} does something to its logits that is not known here",
            "Report the architecture to the project",
        )
    return head, transform
