"""Where final hidden states come from: a model in memory, or a pass over its files that holds one layer at a time.

The teacher runs once; what is kept of it are its states and its head (see `from_states`). A student is read untouched
and with adapters (see `student`). Streamed states of the teacher and of the untouched student depend on the model and
the text alone, so they stay in the cache and serve the next evaluation on the same text; those of adapters are removed
when they have been measured. A pass that was stopped goes on where it stopped (see `streaming.stream_states`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.algebra.figures import Measurement
from moe_svd_distill.architecture.building import find_decoder
from moe_svd_distill.architecture.head import measure_head
from moe_svd_distill.calibration.paired import PairedText
from moe_svd_distill.calibration.text import TokenizedText
from moe_svd_distill.calibration.tokenizer import IntArray
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.evaluation.from_states import (
    BLOCK_TOKENS,
    Block,
    Logits,
    Reader,
    TeacherRecord,
    compare,
    record_states,
)
from moe_svd_distill.evaluation.loading import load_model
from moe_svd_distill.evaluation.request import Progress
from moe_svd_distill.streaming import (
    Head,
    PassSettings,
    StreamedStates,
    head_of,
    load_head,
    stream_states,
)


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
    hidden, head = _teacher_states(model, text, on_progress)
    tokens = len(head.weight) if vocabulary is None else vocabulary
    return record_states(hidden, head, PairedText.read_alike(text, tokens))


def resident_records(
    folder: str | Path,
    texts: Sequence[PairedText],
    device: str,
    on_progress: Progress | None = None,
    use: Callable[[Any], object] = lambda model: None,
    dtype: torch.dtype | None = None,
) -> list[TeacherRecord]:
    """Load the teacher, record its pass over each text, let `use` do what else it is for, and let go of it."""
    teacher = load_model(folder, device, dtype)
    use(teacher)
    records = []
    for text in texts:
        states = _teacher_states(teacher, text.teacher, on_progress)
        records.append(record_states(*states, text, None if text.identical else on_progress))
    del teacher
    gc.collect()
    return records


def streamed_records(
    folder: str | Path,
    texts: Sequence[PairedText],
    cache: Path,
    device: str,
    on_progress: Progress | None = None,
    dtype: torch.dtype | None = None,
) -> list[TeacherRecord]:
    """Run a teacher of any size over all texts at once; its states stay in the cache."""
    read = [text.teacher for text in texts]
    with open_checkpoint(folder) as checkpoint:
        checkpoint.role = "teacher"
        told = told_by_layer(on_progress, "teacher", read)
        settings = PassSettings((device,), dtype)
        states = stream_states(checkpoint, together(read), cache, settings, on_progress=told)
        head = load_head(checkpoint, device, torch.float32)
    pairs = zip(divided(states, read), texts, strict=True)
    return [record_states(hidden, head, text, on_progress) for hidden, text in pairs]


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
    blocks = blocks_of_model(model, teacher.text, name, on_progress)
    return compare(blocks, head_logits(model), teacher, name, readers)


@dataclass(frozen=True, eq=False)
class PredictingRows:
    """Some rows of streamed states without the last position, which predicts nothing; read as they are asked for.

    Attributes:
        states: Final hidden states of all rows, (n, length, d).
        begin: The first row.
        count: How many.
    """

    states: StreamedStates
    begin: int
    count: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(count, length-1, d)."""
        _, length, width = self.states.shape
        return self.count, int(length) - 1, int(width)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computed in."""
        return self.states.dtype

    def __getitem__(self, rows: Any, /) -> Tensor:
        """The states of some rows, (rows, length-1, d); by slice or by index."""
        if isinstance(rows, slice):
            first, last, step = rows.indices(self.count)
            if step == 1:
                return self.states.rows(slice(self.begin + first, self.begin + max(first, last)))[:, :-1]
            rows = range(first, last, step)
        return torch.cat([self[int(row) : int(row) + 1] for row in rows])


@torch.no_grad()
def _teacher_states(model: Any, text: TokenizedText, on_progress: Progress | None) -> tuple[Tensor, Head]:
    """Its states at every position that predicts, (n, length-1, d), on the CPU; and its head, float32 on its device."""
    module = model.get_output_embeddings()
    head = head_of(module, measure_head(model), module.weight.device)
    return torch.cat([states.cpu() for _, states in blocks_of_model(model, text, "teacher", on_progress)]), head


def head_logits(model: Any) -> Logits:
    """The model's own head, with what it does to the logits."""
    head, measured = model.get_output_embeddings(), measure_head(model)
    return lambda states: measured.transform(head(states)[..., : measured.tokens])


@torch.no_grad()
def blocks_of_model(model: Any, text: TokenizedText, name: str, on_progress: Progress | None) -> Iterator[Block]:
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


def together(texts: Sequence[TokenizedText]) -> IntArray:
    """All sequences, (n, length)."""
    return np.concatenate([text.sequences for text in texts])


def divided(states: StreamedStates, texts: Sequence[TokenizedText]) -> list[PredictingRows]:
    """The states of each text among those of all of them."""
    counts = [len(text.sequences) for text in texts]
    begins = [0, *np.cumsum(counts).tolist()]
    return [PredictingRows(states, begin, count) for begin, count in zip(begins, counts, strict=False)]


def told_by_layer(
    on_progress: Progress | None, name: str, texts: Sequence[TokenizedText]
) -> Callable[[int, int], None] | None:
    """Tell the layers done as tokens, which is what a pass is counted in."""
    if on_progress is None:
        return None
    tokens = sum(text.tokens for text in texts)
    return lambda done, layers: on_progress(f"{name}, layer by layer", tokens * done // layers, tokens)
