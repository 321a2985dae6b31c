"""Figures of models that fit in memory: where the states come from, and the heads they go through.

The teacher runs once. What is kept of it are its final hidden states and its head (see `from_states`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.algebra.figures import Measurement
from moe_svd_distill.architecture.building import find_decoder
from moe_svd_distill.architecture.head import measure_head
from moe_svd_distill.calibration.paired import PairedText
from moe_svd_distill.calibration.text import TokenizedText
from moe_svd_distill.evaluation.adapted import AdaptedStudent
from moe_svd_distill.evaluation.from_states import (
    BLOCK_TOKENS,
    Block,
    Logits,
    Progress,
    Reader,
    TeacherRecord,
    compare,
    record_states,
)
from moe_svd_distill.streaming import Head, head_of

__all__ = ["Progress", "ResidentStudent", "TeacherRecord", "measure", "record_teacher"]


def record_teacher(
    model: Any, text: TokenizedText, *, vocabulary: int | None = None, on_progress: Progress | None = None
) -> TeacherRecord:
    """Run the teacher over a text that the student reads in the same tokens; its head lives on in the record.

    Args:
        model: A transformers causal language model.
        text: What to read.
        vocabulary: Compare only the first this many tokens; by default all the head has.
        on_progress: Told about every batch.
    """
    hidden, head = teacher_states(model, text, on_progress)
    tokens = len(head.weight) if vocabulary is None else vocabulary
    return record_states(hidden, head, PairedText.read_alike(text, tokens))


@torch.no_grad()
def teacher_states(model: Any, text: TokenizedText, on_progress: Progress | None = None) -> tuple[Tensor, Head]:
    """Run the teacher over its own reading of a text once; the model can be deleted afterwards.

    Args:
        model: A transformers causal language model.
        text: What to read.
        on_progress: Told about every batch.

    Returns:
        Its states at every position that predicts, (n, length-1, d), on the CPU, and its head, float32 on its device.
    """
    module = model.get_output_embeddings()
    head = head_of(module, measure_head(model), module.weight.device)
    return torch.cat([states.cpu() for _, states in _blocks(model, text, "teacher", on_progress)]), head


@torch.no_grad()
def measure(
    model: Any,
    teacher: TeacherRecord,
    *,
    name: str = "student",
    on_progress: Progress | None = None,
    readers: tuple[Reader, ...] = (),
) -> Measurement:
    """Measure a student, with or without an adapter around its layers, on the text the teacher has read.

    Args:
        model: A transformers causal language model (of a PEFT model: `get_base_model()`).
        teacher: The record of the teacher's pass.
        name: What to call this pass in `on_progress`.
        on_progress: Told about every batch.
        readers: Who else looks at every chunk of logits.
    """
    blocks = _blocks(model, teacher.text, name, on_progress)
    return compare(blocks, _head_logits(model), teacher, name, readers)


class ResidentStudent:
    """A student in memory; every adapter is loaded around its layers by PEFT and taken off again."""

    place: Literal["resident"] = "resident"
    kept: tuple[Path, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextmanager
    def reading(
        self, text: TokenizedText, adapter: Path | None, name: str, on_progress: Progress | None = None
    ) -> Iterator[tuple[Iterator[Block], Logits]]:
        """The student's states of a text and its head, with the adapter or untouched, as long as the context lasts."""
        if adapter is None:
            yield _blocks(self.model, text, name, on_progress), _head_logits(self.model)
            return
        adapted = AdaptedStudent.load(self.model, adapter)
        try:
            yield _blocks(adapted.model, text, name, on_progress), _head_logits(adapted.model)
        finally:
            adapted.detach()


def _head_logits(model: Any) -> Logits:
    head, measured = model.get_output_embeddings(), measure_head(model)
    return lambda states: measured.transform(head(states)[..., : measured.tokens])


@torch.no_grad()
def _blocks(model: Any, text: TokenizedText, name: str, on_progress: Progress | None) -> Iterator[Block]:
    """Run the model over a batch of sequences at a time."""
    decoder, device = find_decoder(model)[0], model.device
    sequences = torch.from_numpy(np.ascontiguousarray(text.sequences))
    step = max(1, BLOCK_TOKENS // text.length)
    if on_progress:
        on_progress(name, 0, text.sequences.size)
    for begin in range(0, len(sequences), step):
        rows = slice(begin, min(begin + step, len(sequences)))
        batch = sequences[rows].to(device)
        yield rows, decoder(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
        if on_progress:
            on_progress(name, begin * text.length + batch.numel(), text.sequences.size)
