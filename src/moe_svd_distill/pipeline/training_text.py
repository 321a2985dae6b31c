"""The text of a training run: what was given, what is read beside it, and what is measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_svd_distill.fitting.check import predicting_places
from moe_svd_distill.pipeline.copying import Copying, draw
from moe_svd_distill.streaming import StreamedStates, load_head
from moe_svd_distill.training.job import TextFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moe_svd_distill.calibration.paired import PairedText
    from moe_svd_distill.pipeline.pair import Model, ModelPair
    from moe_svd_distill.pipeline.texts import RunText
    from moe_svd_distill.recipe import Recipe

Read = Callable[[str, "Model", "NDArray[np.int64]"], StreamedStates]
"""A pass of a model over sequences, under a name."""


def training_texts(
    recipe: Recipe, pair: ModelPair, text: RunText, copying: Copying, read: Read
) -> tuple[TextFile, TextFile]:
    """Draw what is read beside the text, and let the teacher read it all, the search text excepted.

    Args:
        recipe: What is asked for.
        pair: Teacher and student.
        text: From ``read_run_text``, with a part to train on.
        copying: What is read beside it.
        read: Passes a model over sequences.

    Returns:
        The text to train on and the text to measure on meanwhile; both point into the file of the teacher's states.
    """
    fit, check = text.fit, text.validation
    assert fit is not None
    assert check is not None
    count = len(fit.student.sequences)
    head = load_head(pair.student.checkpoint, "cpu", torch.float32, tokens=fit.student_ids)
    copied = draw(fit.student.sequences, copying, lambda name, rows: read(name, pair.student, rows), head, recipe.seed)
    everything = np.concatenate([fit.teacher.sequences, check.teacher.sequences, copied])
    theirs = read("teacher", pair.teacher, everything)
    offset = (count + len(check.teacher.sequences)) * fit.teacher.length
    everywhere = np.arange(copied.size)
    following = np.full(len(fit.student_position) + copied.size, -1, dtype=np.int64)
    predicted = predicting_places(fit)
    following[np.searchsorted(fit.student_position, predicted.student_position)] = predicted.target
    trained_on = TextFile(
        np.concatenate([fit.student.sequences, copied]),
        np.concatenate([fit.student_position, everywhere + count * fit.student.length]),
        np.concatenate([fit.teacher_position, everywhere + offset]),
        following,
        theirs.path,
    )
    return trained_on, _measured_on(check, count, theirs)


def search_text(pair: ModelPair, text: RunText, read: Read) -> TextFile:
    """Let the teacher read the search text, which training does not depend on."""
    return _measured_on(text.search, 0, read("teacher, search text", pair.teacher, text.search.teacher.sequences))


def _measured_on(text: PairedText, begin: int, theirs: StreamedStates) -> TextFile:
    """A text whose sequences are those from `begin` on of the teacher's pass."""
    places = predicting_places(text)
    there = places.teacher_position + begin * text.teacher.length
    return TextFile(text.student.sequences, places.student_position, there, places.target, theirs.path)
