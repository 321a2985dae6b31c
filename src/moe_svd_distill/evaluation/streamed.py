"""Figures of models that do not fit in memory: final hidden states come from a pass that holds one layer at a time.

The states of the teacher and of the untouched student depend on the model and the text alone, so they stay in the cache
and serve the next evaluation on the same text; those of adapters are removed when they have been measured. A pass that
was stopped goes on where it stopped (see `streaming.stream_states`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.calibration.text import IntArray, TokenizedText
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.evaluation.from_states import Block, Logits, Progress, blocks_of
from moe_svd_distill.streaming import Head, PassSettings, ScaledAdapter, StreamedStates, load_head, stream_states


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


def stream_teacher(
    folder: str | Path,
    texts: Sequence[TokenizedText],
    cache: Path,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> tuple[list[PredictingRows], Head]:
    """A teacher's states of several texts, which it reads at once, and its head; the states stay in the cache."""
    with open_checkpoint(folder) as checkpoint:
        states = stream_states(
            checkpoint,
            _together(texts),
            cache,
            PassSettings((device,)),
            on_progress=_by_layer(on_progress, "teacher", texts),
        )
        head = load_head(checkpoint, device, torch.float32)
    return _divided(states, texts), head


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
