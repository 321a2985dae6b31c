"""A student to be measured: in memory, or read layer by layer from its files; untouched and with adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch

from moe_svd_distill.calibration.text import TokenizedText
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.evaluation.from_states import Block, Logits, blocks_of
from moe_svd_distill.evaluation.loading import AdaptedStudent
from moe_svd_distill.evaluation.request import Progress
from moe_svd_distill.evaluation.sources import (
    PredictingRows,
    blocks_of_model,
    divided,
    head_logits,
    together,
    told_by_layer,
)
from moe_svd_distill.streaming import Head, PassSettings, ScaledAdapter, StreamedStates, load_head, stream_states


class ResidentStudent:
    """A student in memory; every adapter is loaded around its layers by PEFT and taken off again."""

    place: Literal["resident"] = "resident"
    kept: tuple[Path, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        found: torch.dtype = self.model.dtype
        return found

    @contextmanager
    def reading(
        self, text: TokenizedText, adapter: Path | None, name: str, on_progress: Progress | None = None
    ) -> Iterator[tuple[Iterator[Block], Logits]]:
        """The student's states of a text and its head, with the adapter or untouched, as long as the context lasts."""
        if adapter is None:
            yield blocks_of_model(self.model, text, name, on_progress), head_logits(self.model)
            return
        with self.adapted(adapter) as model:
            yield blocks_of_model(model, text, name, on_progress), head_logits(model)

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
        dtype: What it computes in; by default what the device multiplies fastest.
    """

    place: Literal["streamed"] = "streamed"

    def __init__(
        self,
        folder: str | Path,
        texts: Sequence[TokenizedText],
        cache: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._checkpoint = open_checkpoint(folder)
        self._checkpoint.role = "student"
        self._texts, self._cache, self._settings = tuple(texts), cache, PassSettings((device,), dtype)
        self._untouched: tuple[StreamedStates, Head] | None = None

    def __enter__(self) -> StreamedStudent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._untouched = None
        self._checkpoint.close()

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, once it has read a text."""
        assert self._untouched
        return self._untouched[0].dtype

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
            yield blocks_of(divided(states, self._texts)[place], name, on_progress), head.logits
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
            together(texts),
            self._cache,
            replace(self._settings, keep=adapter is None),
            adapter=applied,
            on_progress=told_by_layer(on_progress, name, texts),
        )
        # In float32 everywhere: an adapter is added to the head's weight, and bfloat16 would round much of it away.
        return states, load_head(self._checkpoint, self._settings.devices[0], torch.float32, adapter=applied)


Student: TypeAlias = ResidentStudent | StreamedStudent
