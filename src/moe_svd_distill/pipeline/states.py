"""The hidden states a calibrated stage works on: of the text it fits on and of the text its scale is searched on.

Two texts, two passes of each model, so that more search text leaves the states of the fit as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_svd_distill.fitting.check import Places, predicting_places
from moe_svd_distill.fitting.last_layers import RowSegment
from moe_svd_distill.fitting.pairs import Segment, StatePairs
from moe_svd_distill.pipeline.copying import Copying, draw, for_fit
from moe_svd_distill.streaming import Head, PassSettings, StreamedStates, stream_states

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moe_svd_distill.calibration.paired import PairedText
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.pipeline.texts import RunText
    from moe_svd_distill.recipe import Recipe

Report = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Body:
    """The adapter of the weights stage, which the head is fitted on top of.

    Attributes:
        folder: The adapter at scale 1.
        scales: Its scales by group; the head's belongs to the start of the fit.
    """

    folder: Path
    scales: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class MeasuredText:
    """Text that figures are taken on, mapped from its files.

    Attributes:
        states: Final states of both models at the places that predict a common token.
        places: These places.
        rows: Inputs of the last layers for its sequences; None where only the head is fitted.
    """

    states: StatePairs
    places: Places
    rows: RowSegment | None


@dataclass(frozen=True, eq=False)
class TextStates:
    """What the passes over the text of the fit have left, mapped from their files.

    Attributes:
        fit: Final states of both models to fit on, copies included.
        fit_rows: Inputs of the last layers for the sequences of `fit`; empty where only the head is fitted.
        check: The text that passes and ranks are chosen by.
        copying: What was read beside the text.
        passes: Name of each pass to its facts.
    """

    fit: StatePairs
    fit_rows: tuple[RowSegment, ...]
    check: MeasuredText
    copying: Copying
    passes: Mapping[str, Mapping[str, Any]]


class StateReader:
    """Streams both models over the text of a run."""

    def __init__(
        self,
        recipe: Recipe,
        pair: ModelPair,
        text: RunText,
        body: Body | None,
        settings: PassSettings,
        cache: Path,
        last: int,
        report: Report,
        stack: ExitStack,
    ) -> None:
        """Nothing is read yet; `passes` holds the facts of every pass that was.

        Args:
            recipe: What is asked for.
            pair: Teacher and student.
            text: With a part to fit on.
            body: The adapter of the weights stage, which the student then reads the text with.
            settings: Devices.
            cache: Where the states lie.
            last: How many last layers are fitted.
            report: Told the name of a pass and the fraction done.
            stack: Closes the files in the end.
        """
        self._recipe, self._pair, self._text, self._body = recipe, pair, text, body
        self._settings, self._cache, self._last = settings, cache, last
        self._report, self._stack = report, stack
        self.passes: dict[str, dict[str, Any]] = {}

    def read(self, head: Head) -> TextStates:
        """Stream the student, draw the copies from what it expects, stream the teacher, and the student once more.

        Of the search text nothing is read.

        Args:
            head: The student's head over the common tokens, from which the copies are drawn.
        """
        fit, check = self._text.fit, self._text.validation
        assert fit is not None
        assert check is not None
        count = len(fit.student.sequences)
        both = np.concatenate([fit.student.sequences, check.student.sequences])
        mine = self._student("student", both)
        copying = for_fit(self._recipe, fit.student.tokens, count, fit.identical)
        self._report("drawing copies of the text", None)
        copied = draw(fit.student.sequences, copying, self._own_pass, head, self._recipe.seed, mine)
        theirs = self._teacher("teacher", np.concatenate([fit.teacher.sequences, check.teacher.sequences, copied]))
        flat_mine, flat_theirs = _flat(mine), _flat(theirs)
        segments = [Segment(flat_mine, flat_theirs, fit.student_position, fit.teacher_position)]
        rows = [_rows(mine, both[:count], 0, segments[0])]
        if len(copied):
            again = self._student("student, copies", copied)
            everywhere = np.arange(copied.size)
            offset = (count + len(check.teacher.sequences)) * fit.teacher.length
            segments.append(Segment(_flat(again), flat_theirs, everywhere, everywhere + offset))
            rows.append(_rows(again, copied, 0, segments[1]))
        fit_rows = tuple(segment for segment in rows if segment is not None)
        checked = _measured(check, mine, theirs, count)
        return TextStates(StatePairs(segments), fit_rows, checked, copying, dict(self.passes))

    def read_search(self) -> MeasuredText:
        """Stream both models over the search text."""
        search = self._text.search
        mine = self._student("student, search text", search.student.sequences)
        theirs = self._teacher("teacher, search text", search.teacher.sequences)
        return _measured(search, mine, theirs, 0)

    def _own_pass(self, name: str, sequences: NDArray[np.int64]) -> StreamedStates:
        return self._noted(name, self._pass(name, sequences), sequences)

    def _student(self, name: str, sequences: NDArray[np.int64]) -> StreamedStates:
        first = self._pair.student.layout.geometry.layers - self._last
        return self._noted(name, self._pass(name, sequences, first if self._last else None), sequences)

    def _pass(self, name: str, sequences: NDArray[np.int64], record_at: int | None = None) -> StreamedStates:
        body, progress = self._body, self._progress(name)
        given: dict[str, Any] = {} if body is None else {"adapter": body.folder, "scales": dict(body.scales)}
        student = self._pair.student.checkpoint
        return stream_states(
            student, sequences, self._cache, self._settings, record_at=record_at, on_progress=progress, **given
        )

    def _teacher(self, name: str, sequences: NDArray[np.int64]) -> StreamedStates:
        checkpoint, progress = self._pair.teacher.checkpoint, self._progress(name)
        states = stream_states(checkpoint, sequences, self._cache, self._settings, on_progress=progress)
        return self._noted(name, states, sequences)

    def _progress(self, name: str) -> Callable[[int, int], None]:
        return lambda done, layers: self._report(f"reading the text: {name}", done / layers)

    def _noted(self, name: str, states: StreamedStates, sequences: NDArray[np.int64]) -> StreamedStates:
        self._stack.enter_context(states)
        facts = {key: value for key, value in asdict(states.record).items() if key != "unused"}
        self.passes[name] = facts | {"tokens": int(sequences.size), "file": states.path.name}
        return states


def _measured(text: PairedText, mine: StreamedStates, theirs: StreamedStates, begin: int) -> MeasuredText:
    """A text whose sequences are those from `begin` on of both passes."""
    places = predicting_places(text)
    here = places.student_position + begin * text.student.length
    there = places.teacher_position + begin * text.teacher.length
    flat_mine, flat_theirs = _flat(mine), _flat(theirs)
    rows = _rows(mine, text.student.sequences, begin, Segment(flat_mine, flat_theirs, places.student_position, there))
    return MeasuredText(StatePairs([Segment(flat_mine, flat_theirs, here, there)]), places, rows)


def _flat(states: StreamedStates) -> Any:
    return states.rows(slice(None)).flatten(0, 1)


def _rows(states: StreamedStates, ids: NDArray[np.int64], begin: int, segment: Segment) -> RowSegment | None:
    if states.inputs is None:
        return None
    return RowSegment(ids, states.inputs, begin, segment.teacher, segment.student_position, segment.teacher_position)
