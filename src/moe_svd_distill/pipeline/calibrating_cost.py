"""What the calibrated stage would read, compute and keep, from headers and the recipe alone."""

from __future__ import annotations

from dataclasses import dataclass

from moe_svd_distill.pipeline.cost import Rows, readable, state_bytes
from moe_svd_distill.pipeline.extra_text import for_fit
from moe_svd_distill.pipeline.pair import ModelPair
from moe_svd_distill.pipeline.placement import LIBRARIES_BYTES
from moe_svd_distill.pipeline.texts import check_tokens
from moe_svd_distill.recipe import Recipe
from moe_svd_distill.training.settings import passes_over_little, step_over_little

_TEACHER_PASSES = 2
_SAVED_OF_FIT, _HELD_OF_FIT = 4 * 4, 4 * 13  # bytes for each number of the head: value, moments, the best of them


@dataclass(frozen=True)
class CalibratingCost:
    """What the calibrated stage takes.

    Attributes:
        text: Tokens of the text it is fitted on.
        copies: Of that text.
        check_tokens: By which passes and ranks are chosen.
        search_tokens: By which the scale is chosen.
        fit_passes: Over what it is fitted on.
        fit_steps: Of all passes.
        layers: Of the student.
        last_layers: Of these, fitted with the head.
        student_passes: Of the student over all of it.
        teacher_bytes: Stored bytes of the teacher.
        student_bytes: Stored bytes of the student.
        states_bytes: Hidden states kept on the disk.
        saves_bytes: The state of the fit that a stopped run goes on from, on the disk.
        memory_bytes: Of the process that fits the head, about.
    """

    text: int
    copies: int
    check_tokens: int
    search_tokens: int
    fit_passes: int
    fit_steps: int
    layers: int
    last_layers: int
    student_passes: int
    teacher_bytes: int
    student_bytes: int
    states_bytes: int
    saves_bytes: int
    memory_bytes: int

    @property
    def fitted_tokens(self) -> int:
        """The text and its copies."""
        return self.text * (1 + self.copies)

    @property
    def tokens(self) -> int:
        """All that is read."""
        return self.fitted_tokens + self.check_tokens + self.search_tokens

    def rows(self) -> Rows:
        """For people."""
        teacher = f"{readable(_TEACHER_PASSES * self.teacher_bytes)} (teacher {_TEACHER_PASSES} times)"
        student = f"{readable(self.student_passes * self.student_bytes)} (student {self.student_passes} times)"
        rows = [
            ("tokens read", f"{self.tokens:,} ({self.copies} copies of {self.text:,}, checking and search text)"),
            ("weights read", f"{teacher}, {student}"),
            ("hidden states kept", readable(self.states_bytes)),
            ("saves of the fit, at most", readable(self.saves_bytes)),
            ("memory", readable(self.memory_bytes)),
        ]
        return [[f"calibrated stage: {name}", value] for name, value in rows]


def cost_of_calibrating(recipe: Recipe, pair: ModelPair, *, as_start: bool) -> CalibratingCost:
    """What the calibrated stage would read, compute and keep.

    Args:
        recipe: What is asked for.
        pair: Teacher and student.
        as_start: Whether the refined stage follows, for which it is fitted on less text.
    """
    text = min(recipe.tokens, recipe.training.start_tokens) if as_start else recipe.tokens
    extra = for_fit(recipe, text, 1, identical=recipe.vocabulary == "equal")
    copies = extra.sequences(1)
    check, search = check_tokens(recipe), recipe.scale_search_tokens
    teacher, student = pair.teacher, pair.student
    states = state_bytes(recipe, teacher) + state_bytes(recipe, student) * (2 if recipe.last_layers else 1)
    mine, theirs = (of.layout.geometry.vocabulary * of.layout.geometry.hidden for of in (student, teacher))
    step = step_over_little(text * (1 + copies), head_alone=not recipe.last_layers)
    batches = max(1, text * (1 + copies) // step)
    passes = passes_over_little(None if recipe.fit_passes == "auto" else recipe.fit_passes, batches)
    return CalibratingCost(
        text=text,
        copies=copies,
        check_tokens=check,
        search_tokens=search,
        fit_passes=passes,
        fit_steps=passes * batches,
        layers=student.layout.geometry.layers,
        last_layers=recipe.last_layers,
        student_passes=3 if copies else 2,
        teacher_bytes=teacher.checkpoint.total_bytes,
        student_bytes=student.checkpoint.total_bytes,
        states_bytes=(text * (1 + copies) + check + search) * states,
        saves_bytes=2 * _SAVED_OF_FIT * mine,
        memory_bytes=LIBRARIES_BYTES + _HELD_OF_FIT * mine + 4 * theirs,
    )
