"""Where final hidden states come from: a model in memory, or a pass over its files that holds one layer at a time.

The teacher runs once; what is kept of it are its states and its head (see `from_states`). A student is read untouched
and with adapters. Streamed states of the teacher and of the untouched student depend on the model and the text alone,
so they stay in the cache and serve the next evaluation on the same text; those of adapters are removed when they have
been measured. A pass that was stopped goes on where it stopped (see `streaming.stream_states`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

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
    blocks_of,
    compare,
    record_states,
)
from moe_svd_distill.evaluation.loading import AdaptedStudent, load_model
from moe_svd_distill.evaluation.request import Progress
from moe_svd_distill.streaming import (
    Head,
    PassSettings,
    ScaledAdapter,
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
) -> list[TeacherRecord]:
    """Load the teacher, record its pass over each text, let `use` do what else it is for, and let go of it."""
    teacher = load_model(folder, device)
    use(teacher)
    records = []
    for text in texts:
        states = _teacher_states(teacher, text.teacher, on_progress)
        records.append(record_states(*states, text, None if text.identical else on_progress))
    del teacher
    gc.collect()
    return records


def streamed_records(
    folder: str | Path, texts: Sequence[PairedText], cache: Path, device: str, on_progress: Progress | None = None
) -> list[TeacherRecord]:
    """Run a teacher of any size over all texts at once; its states stay in the cache."""
    read = [text.teacher for text in texts]
    with open_checkpoint(folder) as checkpoint:
        checkpoint.role = "teacher"
        told = _by_layer(on_progress, "teacher", read)
        states = stream_states(checkpoint, _together(read), cache, PassSettings((device,)), on_progress=told)
        head = load_head(checkpoint, device, torch.float32)
    divided = zip(_divided(states, read), texts, strict=True)
    return [record_states(hidden, head, text, on_progress) for hidden, text in divided]


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
        with self.adapted(adapter) as model:
            yield _blocks(model, text, name, on_progress), _head_logits(model)

    @contextmanager
    def adapted(self, adapter: Path) -> Iterator[Any]:
        """The model with an adapter, as long as the context lasts."""
        adapted = AdaptedStudent.load(self.model, adapter)
        try:
            yield adapted.model
        finally:
            adapted.detach()


class StreamedStudent:
    """A student of any size, read layer by layer from its files; used as a context.

    Args:
        folder: Local folder of the student.
        texts: All that the untouched student will be asked to read, so that it reads it in one pass.
        cache: Where the states lie.
        device: Where it runs.
    """

    place: Literal["streamed"] = "streamed"

    def __init__(self, folder: str | Path, texts: Sequence[TokenizedText], cache: Path, *, device: str = "cpu") -> None:
        self._checkpoint = open_checkpoint(folder)
        self._checkpoint.role = "student"
        self._texts, self._cache, self._device = tuple(texts), cache, device
        self._untouched: tuple[StreamedStates, Head] | None = None

    def __enter__(self) -> StreamedStudent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._untouched = None
        self._checkpoint.close()

    @property
    def kept(self) -> tuple[Path, ...]:
        """Files of states that stay in the cache."""
        return () if self._untouched is None else (self._untouched[0].path,)

    @contextmanager
    def reading(
        self, text: TokenizedText, adapter: Path | None, name: str, on_progress: Progress | None = None
    ) -> Iterator[tuple[Iterator[Block], Logits]]:
        """The student's states of a text and its head, with the adapter as PEFT loads it or untouched."""
        if adapter is None:
            place = next((place for place, known in enumerate(self._texts) if known is text), None)
            if place is None:
                raise ValueError("the untouched student was not told of this text")
            if self._untouched is None:
                self._untouched = self._stream(self._texts, None, name, on_progress)
            states, head = self._untouched
            yield blocks_of(_divided(states, self._texts)[place], name, on_progress), head.logits
            return
        states, head = self._stream((text,), adapter, name, on_progress)
        with states:
            yield blocks_of(PredictingRows(states, 0, states.shape[0]), name, on_progress), head.logits

    def _stream(
        self, texts: Sequence[TokenizedText], adapter: Path | None, name: str, on_progress: Progress | None
    ) -> tuple[StreamedStates, Head]:
        applied = None if adapter is None else ScaledAdapter(adapter)
        states = stream_states(
            self._checkpoint,
            _together(texts),
            self._cache,
            PassSettings((self._device,), keep=adapter is None),
            adapter=applied,
            on_progress=_by_layer(on_progress, name, texts),
        )
        # In float32 everywhere: an adapter is added to the head's weight, and bfloat16 would round much of it away.
        return states, load_head(self._checkpoint, self._device, torch.float32, adapter=applied)


Student: TypeAlias = ResidentStudent | StreamedStudent


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
    return torch.cat([states.cpu() for _, states in _blocks(model, text, "teacher", on_progress)]), head


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


def _together(texts: Sequence[TokenizedText]) -> IntArray:
    """All sequences, (n, length)."""
    return np.concatenate([text.sequences for text in texts])


def _divided(states: StreamedStates, texts: Sequence[TokenizedText]) -> list[PredictingRows]:
    """The states of each text among those of all of them."""
    counts = [len(text.sequences) for text in texts]
    begins = [0, *np.cumsum(counts).tolist()]
    return [PredictingRows(states, begin, count) for begin, count in zip(begins, counts, strict=False)]


def _by_layer(
    on_progress: Progress | None, name: str, texts: Sequence[TokenizedText]
) -> Callable[[int, int], None] | None:
    """Tell the layers done as tokens, which is what a pass is counted in."""
    if on_progress is None:
        return None
    tokens = sum(text.tokens for text in texts)
    return lambda done, layers: on_progress(f"{name}, layer by layer", tokens * done // layers, tokens)
