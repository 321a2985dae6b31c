"""What the stages on text would read, compute and keep, from headers and the recipe alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_svd_distill.calibration.text import whole
from moe_svd_distill.files.dtypes import BYTES_PER_ELEMENT
from moe_svd_distill.pipeline.assembly import asked_head_rank, head_is_whole
from moe_svd_distill.pipeline.extra_text import ROUNDS
from moe_svd_distill.pipeline.pair import Model, ModelPair
from moe_svd_distill.pipeline.placement import execution_settings, place_training
from moe_svd_distill.pipeline.schedule import (
    StageName,
    TrainingSchedule,
    schedule_calibrated,
    schedule_refined,
)
from moe_svd_distill.pipeline.texts import RunText, TextSize, expected_text
from moe_svd_distill.pipeline.trained_matrices import trained_numbers, trained_shapes
from moe_svd_distill.recipe import Recipe
from moe_svd_distill.streaming import PassSettings
from moe_svd_distill.training.head_rank import SERVED_RANKS
from moe_svd_distill.training.settings import needs_rows
from moe_svd_distill.training.trials import MULTIPLES, trial_steps

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
Rows = list[list[str]]
_SCALES_TRIED = 3  # of the trained adapter on the search text: none, half, whole; fewer gain needs more
SAVES_KEPT, SAVED_BYTES = 2, 4 * 4  # files in turn; value, best value and at most two moments, float32


@dataclass(frozen=True)
class TrainingCost:
    """What a stage on text takes.

    Attributes:
        stage: Its name.
        teacher_tokens: That the teacher reads.
        copies: Of the training text among them.
        own_text: Tokens of the student's own text among them.
        read_by_student: Tokens that the student reads to draw others, or to record what goes into later layers.
        student_passes: In which it does that.
        weights_read: Stored bytes read for the hidden states of both models.
        states_bytes: Hidden states kept on the disk.
        teacher_states_bytes: The teacher's among them.
        steps: Of the optimiser, at most.
        step_tokens: Tokens of one step.
        trial_steps: Further steps that choose the learning rate.
        trained_tokens: Tokens trained on in all, repeated ones counted again.
        measured_tokens: Tokens that the student is measured on meanwhile and in the scale search, the same.
        ranked_tokens: Tokens that its head is measured on at further ranks.
        share: Of the student's layers that are trained.
        teacher_operations: Floating point operations of the teacher's forward pass, and of its head in training.
        student_operations: Those of the student's training and of measuring it meanwhile.
        adapter_bytes: The adapter's size, at most.
        saves_bytes: What a stopped run goes on from, on the disk.
        rows_bytes: What a head that stands still needs of the teacher, on the disk while training runs.
        resident: Whether the student would be in memory; None where its files are not at hand to tell.
        placement: Why, in words; empty where that is not known.
        processes: That share the training.
        memory_bytes: Of a process in which the student is trained in memory, at most; 0 where it would not be, or that
            is not known.
        step_bytes: Stored bytes of weights read in each step, if streamed.
        training_bytes: The same in all, with those for measuring the student meanwhile.
    """

    stage: StageName
    teacher_tokens: int
    copies: int
    own_text: int
    read_by_student: int
    student_passes: int
    weights_read: int
    states_bytes: int
    teacher_states_bytes: int
    steps: int
    step_tokens: int
    trial_steps: int
    trained_tokens: int
    measured_tokens: int
    ranked_tokens: int
    share: float
    teacher_operations: int
    student_operations: int
    adapter_bytes: int
    saves_bytes: int
    rows_bytes: int
    resident: bool | None
    placement: str
    processes: int
    memory_bytes: int
    step_bytes: int
    training_bytes: int

    def rows(self) -> Rows:
        """For people."""
        trials = f", and {self.trial_steps:,} or somewhat more to choose the learning rate" if self.trial_steps else ""
        beside = f"{self.copies} copies, {self.own_text:,} of the student's own, checking and search text"
        rows = [
            ("tokens read", f"{self.teacher_tokens:,} ({beside})"),
            ("weights read for hidden states", readable(self.weights_read)),
            ("hidden states kept", readable(self.states_bytes)),
            ("steps", f"{self.steps:,} of {self.step_tokens:,} tokens, at most{trials}"),
            ("tokens trained on", f"{self.trained_tokens:,}, repeated ones counted again"),
            ("operations of the teacher", operations(self.teacher_operations)),
            ("operations of the student", operations(self.student_operations)),
            ("adapter, at most", readable(self.adapter_bytes)),
            ("saves of the training, at most", readable(self.saves_bytes)),
        ]
        if self.rows_bytes:
            rows.append(("the teacher's part for the fixed head, while training", readable(self.rows_bytes)))
        if self.memory_bytes:
            rows.append(("memory of each process", readable(self.memory_bytes)))
        if self.placement:
            rows.append(("student", f"{'in memory' if self.resident else 'one layer at a time'}: {self.placement}"))
        if self.resident is False:
            rows.append(("weights read in each step", readable(self.step_bytes)))
            rows.append(("weights read while training", readable(self.training_bytes)))
        return [[f"{self.stage} stage: {name}", value] for name, value in rows]


def costs_of_training(
    recipe: Recipe, pair: ModelPair, stages: Sequence[str], *, at_hand: bool, text: RunText | None = None
) -> dict[str, TrainingCost]:
    """What each stage on text would read, compute and keep, by its name.

    Args:
        recipe: What is asked for.
        pair: Teacher and student.
        stages: Of the run.
        at_hand: Whether the weights are on this machine, so that it can be said where the student would be trained.
        text: What is there to read; by default as much as is asked for.
    """
    device, found = execution_settings(recipe).devices[0], {}
    for stage in ("calibrated", "refined"):
        if stage not in stages:
            continue
        start = stage == "calibrated" and "refined" in stages
        size = _size(recipe, pair, text, min(recipe.tokens, recipe.training.start_tokens) if start else recipe.tokens)
        schedule = (
            schedule_calibrated(recipe, pair.student, size, device, head_alone="weights" in stages)
            if stage == "calibrated"
            else schedule_refined(recipe, pair.student, stages, size, device)
        )
        search = text.search.student.tokens if text else whole(recipe.scale_search_tokens, size.length)
        found[stage] = _cost(recipe, pair, schedule, size, search, at_hand)
    return found


def _size(recipe: Recipe, pair: ModelPair, text: RunText | None, tokens: int) -> TextSize:
    if text is None or text.fit is None:
        return expected_text(recipe, pair, tokens)
    return TextSize.of(replace(text, fit=text.fit.beginning(tokens)) if tokens < recipe.tokens else text)


def _cost(
    recipe: Recipe, pair: ModelPair, schedule: TrainingSchedule, text: TextSize, search: int, at_hand: bool
) -> TrainingCost:
    teacher, student, execution = pair.teacher, pair.student, execution_settings(recipe)
    settings, extra = schedule.settings, schedule.extra
    placed = place_training(recipe, pair, execution, schedule) if at_hand else None
    resident = placed.resident if placed else {"resident": True, "streamed": False}.get(recipe.training.placement)
    processes = len(placed.devices) if placed else len(execution.devices)
    read = (text.sequences + extra.sequences(text.sequences)) * text.length + text.check + search
    own = extra.generated * text.length
    drawn = text.tokens * bool(extra.copies) + ROUNDS * own
    recorded = read if schedule.first else 0
    kept_by_student = drawn + recorded * (1 if schedule.head_alone else 2)
    trials = len(MULTIPLES) if schedule.tries_rates else 0
    tried = trials * trial_steps(schedule.steps)
    trained_tokens = (schedule.steps + tried) * settings.step_tokens
    measurements = 1 + min(settings.checks, schedule.steps) + trials
    measured = text.check * measurements + search * _SCALES_TRIED
    rows_bytes = 0
    if needs_rows(not schedule.head_moves, settings.divergence):
        rows_bytes = 4 * read * (student.layout.geometry.hidden + 1)
    body, head = teacher.active_parameters
    teacher_operations = 2 * body * read + 2 * head * (read if rows_bytes else trained_tokens + measured)
    body, head = student.active_parameters
    body = int(body * schedule.share)
    # Forward, and twice that for both gradients; streamed, every layer is computed once more on the way back.
    student_operations = (8 if resident is False else 6) * body * trained_tokens + 2 * (body + head) * measured
    student_operations += (6 if schedule.head_moves else 4) * head * trained_tokens
    shapes = trained_shapes(student, schedule.ranks)
    moving = trained_numbers(shapes, schedule.ranks) + (head if schedule.head_moves else 0)
    stored = sum(rank * sum(shapes[name]) for name, rank in schedule.ranks.items())  # padded where a side is smaller
    pass_bytes = int(student.checkpoint.total_bytes * schedule.share) * processes if resident is False else 0
    passes = bool(extra.copies) + ROUNDS * bool(extra.generated) + 2 * bool(recorded)
    asked_rank = asked_head_rank(recipe, student.architecture.head)
    teacher_states = state_bytes(recipe, teacher) * read
    return TrainingCost(
        stage=schedule.stage,
        teacher_tokens=read,
        copies=extra.copies,
        own_text=own,
        read_by_student=drawn + recorded,
        student_passes=passes,
        weights_read=2 * teacher.checkpoint.total_bytes + student.checkpoint.total_bytes * passes,
        states_bytes=teacher_states + state_bytes(recipe, student) * kept_by_student,
        teacher_states_bytes=teacher_states,
        steps=schedule.steps,
        step_tokens=settings.step_tokens,
        trial_steps=tried,
        trained_tokens=trained_tokens,
        measured_tokens=measured,
        ranked_tokens=text.check * len(SERVED_RANKS) if schedule.head_moves and asked_rank == "auto" else 0,
        share=schedule.share,
        teacher_operations=teacher_operations,
        student_operations=student_operations,
        adapter_bytes=stored * BYTES[recipe.dtype] + (_head_bytes(recipe, pair) if schedule.head_moves else 0),
        saves_bytes=SAVES_KEPT * SAVED_BYTES * moving,
        rows_bytes=rows_bytes * processes,
        resident=resident,
        placement=placed.reason if placed else "",
        processes=processes,
        memory_bytes=placed.memory_bytes if placed and placed.resident else 0,
        step_bytes=2 * pass_bytes,
        training_bytes=pass_bytes * (2 * (schedule.steps + tried) + measurements),
    )


def readable(size: float) -> str:
    """Bytes in the fitting unit."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def operations(count: float) -> str:
    """Floating point operations in the fitting unit."""
    count /= 1e9
    for unit in ("GFLOP", "TFLOP", "PFLOP"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} EFLOP"


def _head_bytes(recipe: Recipe, pair: ModelPair) -> int:
    """The head's share of the adapter: all of it, or a pair of the highest rank it may get."""
    geometry = pair.student.layout.geometry
    rows, columns = geometry.vocabulary, geometry.hidden
    if head_is_whole(recipe, pair):
        architecture = pair.student.architecture
        stored = pair.student.checkpoint[architecture.embedding if architecture.tied else architecture.head]
        return rows * columns * BYTES_PER_ELEMENT[stored.dtype]
    asked = asked_head_rank(recipe, pair.student.architecture.head)
    rank = min(columns, SERVED_RANKS[-1]) if asked == "auto" else columns if asked == "full" else int(asked)
    return rank * (rows + columns) * BYTES[recipe.dtype]


def state_bytes(recipe: Recipe, model: Model) -> int:
    """Bytes of a cached hidden state of a token."""
    width = model.layout.geometry.hidden
    return width * PassSettings(execution_settings(recipe).devices).compute_dtype(width).itemsize
