"""The text of a stage: what was given, what is read beside it, and the states that both models have of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from moe_svd_distill.pipeline.extra_text import draw
from moe_svd_distill.streaming import PassSettings, ScaledAdapter, StreamedStates, load_head, stream_states
from moe_svd_distill.training.measuring import predicting_places
from moe_svd_distill.training.text import InputsFile, TextFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moe_svd_distill.calibration.paired import PairedText
    from moe_svd_distill.checkpoints import Checkpoint
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.pipeline.schedule import TrainingSchedule
    from moe_svd_distill.pipeline.texts import RunText
    from moe_svd_distill.streaming import Head

Report: TypeAlias = Callable[[str, float | None], None]
"""Told the name of a step and the fraction done."""


class Passes:
    """Streamed passes of a pair over text.

    Attributes:
        facts: Name of each pass to what it did.
    """

    def __init__(
        self, pair: ModelPair, settings: PassSettings, cache: Path, adapter: ScaledAdapter | None, report: Report
    ) -> None:
        """Nothing is read yet.

        Args:
            pair: Teacher and student.
            settings: Devices.
            cache: Where the states lie.
            adapter: What the student reads with.
            report: Told the name of a pass and the fraction done.
        """
        self._pair, self._settings, self._cache, self._report = pair, settings, cache, report
        self._adapter = adapter
        self._stack = ExitStack()
        self.facts: dict[str, dict[str, Any]] = {}

    def student(self, name: str, sequences: NDArray[np.int64], record_at: int | None = None) -> StreamedStates:
        """A pass of the student; what a layer is given is kept as well where one is named."""
        settings = replace(self._settings, record_at=record_at)
        return self._read(name, self._pair.student.checkpoint, sequences, settings, self._adapter)

    def teacher(self, name: str, sequences: NDArray[np.int64]) -> StreamedStates:
        """A pass of the teacher."""
        return self._read(name, self._pair.teacher.checkpoint, sequences, self._settings)

    def _read(
        self,
        name: str,
        checkpoint: Checkpoint,
        sequences: NDArray[np.int64],
        settings: PassSettings,
        adapter: ScaledAdapter | None = None,
    ) -> StreamedStates:
        def progress(done: int, layers: int) -> None:
            self._report(f"reading the text: {name}", done / layers)

        states = stream_states(checkpoint, sequences, self._cache, settings, adapter=adapter, on_progress=progress)
        self._stack.enter_context(states)
        facts = {key: value for key, value in asdict(states.record).items() if key != "unused"}
        self.facts[name] = facts | {"tokens": int(sequences.size), "file": states.path.name}
        return states

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def stage_texts(text: RunText, schedule: TrainingSchedule, passes: Passes, head: Head) -> tuple[TextFile, TextFile]:
    """Draw what is read beside the text, and let the models read it all, the search text excepted.

    Args:
        text: From ``read_run_text``, with a part to train on.
        schedule: What is read beside it, and where training begins.
        passes: Reads.
        head: The student's over the common tokens, as it is when training begins.

    Returns:
        The text to train on and the text to measure on meanwhile.
    """
    fit, check = text.fit, text.validation
    assert fit is not None
    assert check is not None
    count = len(fit.student.sequences)
    copied = draw(fit.student.sequences, schedule.extra, passes.student, head, schedule.settings.seed)
    theirs = passes.teacher("teacher", np.concatenate([fit.teacher.sequences, check.teacher.sequences, copied]))
    ids = np.concatenate([fit.student.sequences, copied])
    offset = (count + len(check.teacher.sequences)) * fit.teacher.length
    everywhere = np.arange(copied.size)
    following = np.full(len(fit.student_position) + copied.size, -1, dtype=np.int64)
    predicted = predicting_places(fit)
    following[np.searchsorted(fit.student_position, predicted.student_position)] = predicted.target
    trained_on = TextFile(
        ids,
        np.concatenate([fit.student_position, everywhere + count * fit.student.length]),
        np.concatenate([fit.teacher_position, everywhere + offset]),
        following,
        theirs.path,
    )
    texts = {0: trained_on, len(ids): _measured_on(check, count, theirs)}
    name = "student, what it is trained on" if "student" in passes.facts else "student"
    everything = np.concatenate([ids, check.student.sequences])
    trained_on, checked = _with_inputs(texts, schedule, passes, name, everything)
    return trained_on, checked


def search_text(text: RunText, schedule: TrainingSchedule, passes: Passes) -> TextFile:
    """Let the models read the search text, which training does not depend on."""
    theirs = passes.teacher("teacher, search text", text.search.teacher.sequences)
    texts = {0: _measured_on(text.search, 0, theirs)}
    (searched,) = _with_inputs(texts, schedule, passes, "student, search text", text.search.student.sequences)
    return searched


def _with_inputs(
    texts: Mapping[int, TextFile],
    schedule: TrainingSchedule,
    passes: Passes,
    name: str,
    sequences: NDArray[np.int64],
) -> list[TextFile]:
    """Let the student read sequences, for texts that begin at some of them, and note what training is given.

    Nothing is read where training begins at the first layer: there all follows from the token ids. Where the head
    is trained alone, every place becomes a sequence of its own, so that a step takes places from anywhere.
    """
    if schedule.first == 0:
        return list(texts.values())
    states = passes.student(name, sequences, None if schedule.head_alone else schedule.first)
    if schedule.head_alone:
        length = sequences.shape[1]
        return [_by_place(text, states.path, begin * length) for begin, text in texts.items()]
    assert states.inputs is not None
    return [
        replace(text, inputs=InputsFile(states.inputs.path, schedule.first, begin + np.arange(len(text.ids))))
        for begin, text in texts.items()
    ]


def student_head(pair: ModelPair, adapter: ScaledAdapter | None, tokens: NDArray[np.int64], device: str) -> Head:
    """The student's head over some tokens, float32, with what an adapter changes about it."""
    acting = adapter if adapter is not None and adapter.acts else None
    return load_head(pair.student.checkpoint, device, torch.float32, tokens=tokens, adapter=acting)


def _measured_on(text: PairedText, begin: int, theirs: StreamedStates) -> TextFile:
    """A text whose sequences are those from `begin` on of the teacher's pass."""
    places = predicting_places(text)
    there = places.teacher_position + begin * text.teacher.length
    return TextFile(text.student.sequences, places.student_position, there, places.target, theirs.path)


def _by_place(text: TextFile, states: Path, begin: int) -> TextFile:
    """Every place as a sequence of one token, with the student's final state there; `begin` is the text's first."""
    ids = text.ids.reshape(-1)[text.position][:, None]
    inputs = InputsFile(states, None, begin + text.position)
    return replace(text, ids=ids, position=np.arange(len(ids)), inputs=inputs)
