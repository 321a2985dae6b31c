"""Figures from final hidden states and heads, wherever the states came from: a model in memory, or a file.

The logits of more than a few hundred tokens never exist: states and heads are kept, and both models' exact
distributions are computed again from these, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.algebra.distribution import cross_entropy, kl_divergence, top1_agreement
from moe_svd_distill.calibration.text import IntArray, TokenizedText
from moe_svd_distill.errors import BadDataError, IncompatiblePairError
from moe_svd_distill.evaluation.figures import FloatArray, Measurement
from moe_svd_distill.evaluation.result import Aligned

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the name of a pass, the tokens done and the tokens to do."""

Block: TypeAlias = tuple[slice, Tensor]
"""Rows of a text, and their states at every position that predicts, (rows, length-1, d)."""

Logits: TypeAlias = Callable[[Tensor], Tensor]
"""From states, (tokens, d), to logits, (tokens, vocabulary)."""

LOGIT_BYTES = 64 << 20  # of one model's logits, float32, at a time
BLOCK_TOKENS = 2048


class Hidden(Protocol):
    """Final hidden states at every position that predicts, (n, length-1, d), read as they are asked for."""

    @property
    def shape(self) -> Any:
        """(n, length-1, d)."""

    def __getitem__(self, rows: Any, /) -> Tensor:
        """The states of some rows, (rows, length-1, d)."""


class Reader(Protocol):
    """Takes from each chunk of tokens what it needs."""

    def add(self, wanted: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Logits of teacher and student, (tokens, vocabulary), and the tokens that follow, (tokens,); on one device."""


class Record(Protocol):
    """All that is kept of the teacher after its one pass, and at which tokens a student is held against it."""

    @property
    def hidden(self) -> Hidden:
        """The teacher's states."""

    @property
    def vocabulary(self) -> int:
        """Tokens the distributions are taken over."""

    @property
    def measurement(self) -> Measurement:
        """The teacher's own figures."""

    @property
    def text(self) -> TokenizedText:
        """The text as the student reads it."""

    @property
    def units(self) -> IntArray:
        """The independent unit of every token that is compared, in the order of the text, or -1 for padding; flat."""

    @property
    def aligned(self) -> Aligned | None:
        """What of both models is compared; None where they number their tokens alike."""

    def chunks(self, rows: slice, states: Tensor, logits: Logits) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Teacher's and student's logits, (tokens, vocabulary), and the tokens that follow, (tokens,), a few at a time.

        Args:
            rows: Rows of the text.
            states: The student's states of these, (rows, length-1, d).
            logits: The student's head.

        Raises:
            IncompatiblePairError: The student's head has fewer tokens than are compared.
        """


@dataclass(frozen=True, eq=False)
class TeacherStates:
    """A teacher's final states of a text and its whole head.

    Attributes:
        hidden: States after the last norm, (n, length-1, d).
        weight: The head, float32, (V, d).
        bias: The head's bias, float32, (V,), or None.
        transform: What follows the head.
    """

    hidden: Hidden
    weight: Tensor
    bias: Tensor | None
    transform: Logits


@dataclass(frozen=True, eq=False)
class TeacherRecord:
    """The record of a teacher that numbers its tokens as the student does.

    Attributes:
        hidden: Final hidden states after the last norm, (n, length-1, d): a tensor on the CPU, which may be mapped
            from a file, or anything that reads like one.
        weight: The head, float32, (V, d).
        bias: The head's bias, float32, (V,), or None.
        transform: What follows the head.
        vocabulary: Tokens the distributions are taken over; the first this many.
        measurement: The teacher's own figures on the text (KL 0, agreement 1).
        text: The text it read.
    """

    hidden: Hidden
    weight: Tensor
    bias: Tensor | None
    transform: Logits
    vocabulary: int
    measurement: Measurement
    text: TokenizedText
    aligned: None = None

    @property
    def units(self) -> IntArray:
        """The independent unit of every token that has a predecessor; flat."""
        return units_of(self.text)

    def chunks(self, rows: slice, states: Tensor, logits: Logits) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits at every token that has a predecessor."""
        for part, recorded, targets in _chunks(states, self.hidden[rows], self.text, rows, self.vocabulary):
            given = logits(part)
            require_tokens(given, self.vocabulary)
            given = given[:, : self.vocabulary].float()
            yield self.logits(recorded).to(given.device), given, targets.to(given.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """The teacher's logits from its hidden states, (tokens, d) to (tokens, vocabulary), on the head's device."""
        return linear_logits(hidden, self.weight, self.bias, self.transform, self.vocabulary)


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Logits, vocabulary: int) -> Tensor:
    """Logits of the first `vocabulary` tokens in float32, (tokens, d) to (tokens, vocabulary), on the head's device."""
    states = hidden.to(weight.device, torch.float32)
    offset = None if bias is None else bias[:vocabulary]
    return transform(torch.nn.functional.linear(states, weight[:vocabulary], offset))


@torch.no_grad()
def own_figures(blocks: Iterable[Block], logits: Logits, text: TokenizedText, vocabulary: int) -> Measurement:
    """The teacher's own figures: its cross-entropy, with a KL of 0 and an agreement of 1."""
    sums = Sums(units_of(text))
    for rows, states in blocks:
        for part, _, targets in _chunks(states, None, text, rows, vocabulary):
            given = logits(part)
            sums.add(given, given, targets.to(given.device), itself=True)
    return sums.measurement()


@torch.no_grad()
def compare(
    blocks: Iterable[Block], logits: Logits, teacher: Record, name: str, readers: Sequence[Reader] = ()
) -> Measurement:
    """Measure a student by its states on the text the teacher has read.

    Args:
        blocks: The student's states; every row once, in the order of the text.
        logits: The student's head with all that follows it.
        teacher: The record of the teacher's pass.
        name: Whose figures these are, for an error.
        readers: Who else looks at every chunk of logits.

    Raises:
        IncompatiblePairError: The student's head has fewer tokens than are compared.
        BadDataError: The figures are not finite.
    """
    sums = Sums(teacher.units)
    everyone: tuple[Reader, ...] = (sums, *readers)
    for rows, states in blocks:
        for wanted, given, targets in teacher.chunks(rows, states, logits):
            for reader in everyone:
                reader.add(wanted, given, targets)
    measurement = sums.measurement()
    if not np.isfinite(measurement.kl).all() or not np.isfinite(measurement.cross_entropy).all():
        raise BadDataError(
            f"The figures of the {name} are not finite", "Check the adapter for NaN: moe-svd-distill verify"
        )
    return measurement


def blocks_of(hidden: Hidden, name: str, on_progress: Progress | None = None) -> Iterator[Block]:
    """Read stored states block by block, in order."""
    rows, length = int(hidden.shape[0]), int(hidden.shape[1]) + 1
    step = max(1, BLOCK_TOKENS // length)
    if on_progress:
        on_progress(name, 0, rows * length)
    for begin in range(0, rows, step):
        block = slice(begin, min(begin + step, rows))
        yield block, hidden[block]
        if on_progress:
            on_progress(name, block.stop * length, rows * length)


class Sums:
    """Adds up figures by document, token after token in the order of the text."""

    def __init__(self, units: IntArray) -> None:
        self.units = units
        self.values: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, wanted: Tensor, logits: Tensor, targets: Tensor, *, itself: bool = False) -> None:
        """Take KL, cross-entropy and agreement of every token; `itself` spares the comparison of equal logits."""
        entropy = cross_entropy(logits, targets).cpu()
        if itself:
            zeros = torch.zeros_like(entropy)
            self.values.append((zeros, entropy, zeros + 1))
        else:
            self.values.append(
                (kl_divergence(wanted, logits).cpu(), entropy, top1_agreement(wanted, logits).float().cpu())
            )

    def measurement(self) -> Measurement:
        """The sums of every document."""
        kl, entropy, agreement = (self._by_document(column) for column in zip(*self.values, strict=True))
        return Measurement(kl, entropy, agreement, np.bincount(self.units[self.units >= 0]).astype(np.float64))

    def _by_document(self, parts: Sequence[Tensor]) -> FloatArray:
        values, real = torch.cat(list(parts)).double().numpy(), self.units >= 0
        return np.bincount(self.units[real], weights=values[real]).astype(np.float64)


def units_of(text: TokenizedText) -> IntArray:
    """The independent unit of every token that has a predecessor, numbered without gaps, or -1 for padding, flat."""
    units = np.array(text.units()[:, 1:], dtype=np.int64).reshape(-1)
    real = text.document_of_token[:, 1:].reshape(-1) >= 0
    units[~real] = -1
    _, units[real] = np.unique(units[real], return_inverse=True)
    return units


def require_tokens(logits: Tensor, count: int) -> None:
    """Refuse a student's logits, (tokens, V), of fewer tokens than are compared.

    Raises:
        IncompatiblePairError: V is below `count`.
    """
    if logits.shape[-1] < count:
        raise IncompatiblePairError(
            f"The student's head has {logits.shape[-1]} tokens, fewer than the {count} to compare",
            "Compare only the tokens both models have",
        )


def chunk_tokens(vocabulary: int) -> int:
    """How many tokens' logits may exist at a time."""
    return max(1, LOGIT_BYTES // (4 * vocabulary))


def _chunks(
    states: Tensor, recorded: Tensor | None, text: TokenizedText, rows: slice, vocabulary: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield states of student and teacher, (tokens, d), and the tokens that follow, (tokens,), a chunk at a time."""
    targets = torch.from_numpy(np.ascontiguousarray(text.sequences[rows, 1:])).flatten()
    flat = states.flatten(0, 1)
    other = flat if recorded is None else recorded.flatten(0, 1)
    if not len(flat) == len(other) == len(targets):
        raise ValueError(f"{len(flat)} and {len(other)} states for {len(targets)} predicted tokens")
    step = chunk_tokens(vocabulary)
    for begin in range(0, len(flat), step):
        chunk = slice(begin, begin + step)
        yield flat[chunk], other[chunk], targets[chunk]
