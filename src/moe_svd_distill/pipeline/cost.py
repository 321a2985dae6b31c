"""What the stages on text would read, compute and keep, from headers and the recipe alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from moe_svd_distill.calibration.text import whole
from moe_svd_distill.files.dtypes import BYTES_PER_ELEMENT
from moe_svd_distill.pipeline.assembly import asked_head_rank, head_is_whole
from moe_svd_distill.pipeline.extra_text import ROUNDS, for_training
from moe_svd_distill.pipeline.pair import Model, ModelPair
from moe_svd_distill.pipeline.placement import Placement, TrainedParts, place_training
from moe_svd_distill.pipeline.preparation import execution_settings
from moe_svd_distill.pipeline.ranks import trained_numbers, trained_ranks, trained_shapes
from moe_svd_distill.pipeline.steps import checks, epochs, optimiser_steps, sequence_length, trains_head
from moe_svd_distill.pipeline.texts import check_tokens, longest_sequence
from moe_svd_distill.recipe import Recipe

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
Rows = list[list[str]]
_SCALES_TRIED = 3  # of the trained adapter on the search text: none, half, whole; fewer gain needs more
SAVES_KEPT, SAVED_BYTES = 2, 4 * 4  # files in turn; value, best value and at most two moments, float32


@dataclass(frozen=True)
class TrainingCost:
    """What the refined stage takes.

    Attributes:
        teacher_tokens: That the teacher reads.
        copies: Of the training text among them.
        own_text: Tokens of the student's own text among them.
        weights_read: Stored bytes read for the hidden states: the teacher once, the student for what it draws.
        states_bytes: Hidden states kept on the disk.
        steps: Of the optimiser, at most.
        step_tokens: Tokens of one step.
        trial_steps: Further steps that choose the learning rate.
        trained_tokens: Tokens trained on in all, repeated ones counted again.
        measured_tokens: Tokens that the student is measured on meanwhile and in the scale search, the same.
        read_by_student: Tokens that the student reads to draw others.
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

    teacher_tokens: int
    copies: int
    own_text: int
    weights_read: int
    states_bytes: int
    steps: int
    step_tokens: int
    trial_steps: int
    trained_tokens: int
    measured_tokens: int
    read_by_student: int
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

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

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
        return [[f"refined stage: {name}", value] for name, value in rows]


def cost_of_training(recipe: Recipe, pair: ModelPair, stages: Sequence[str], *, at_hand: bool) -> TrainingCost:
    """What the refined stage would read, compute and keep.

    Args:
        recipe: What is asked for.
        pair: Teacher and student.
        stages: Of the run.
        at_hand: Whether the weights are on this machine, so that it can be said where the student would be trained.
    """
    teacher, student = pair.teacher, pair.student
    length = sequence_length(recipe, longest_sequence(pair))
    once, search = whole(recipe.tokens, length), whole(recipe.scale_search_tokens, length)
    head_moves = trains_head(recipe, student.layout.geometry.vocabulary)
    check = whole(check_tokens(recipe), length)
    extra = for_training(recipe, once, once // length, recipe.vocabulary == "equal", head_moves)
    text = once + extra.sequences(once // length) * length
    passes = bool(extra.copies) + ROUNDS * bool(extra.generated)
    read_by_student = once * bool(extra.copies) + ROUNDS * extra.generated * length
    ranks = trained_ranks(recipe, student)
    asked = recipe.training.placement
    steps, step_tokens = optimiser_steps(recipe, epochs(recipe, stages, head_moves), text, length)
    trained_parts = TrainedParts(ranks, head_moves, step_tokens // length, step_tokens)
    placed = _place(recipe, pair, trained_parts) if at_hand else None
    resident = placed.resident if placed else {"resident": True, "streamed": False}.get(asked)
    trials, trial_steps = _trials(recipe, steps)
    trained = (steps + trials * trial_steps) * step_tokens
    measurements = 1 + min(checks(recipe, steps * step_tokens, check), steps) + trials
    measured = check * measurements + search * _SCALES_TRIED
    read = text + check + search
    body, head = active_parameters(teacher)
    times = read if _rows_bytes(recipe, read, student) else trained + measured
    teacher_operations = 2 * body * read + 2 * head * times
    body, head = active_parameters(student)
    moving = head if head_moves else 0
    # Forward, and twice that for both gradients; streamed, every layer is computed once more on the way back.
    student_operations = (8 if resident is False else 6) * body * trained + (6 if head_moves else 4) * head * trained
    student_operations += 2 * (body + head) * measured
    states = state_bytes(recipe, teacher) * read + state_bytes(recipe, student) * read_by_student
    shapes = trained_shapes(student, ranks)
    factors = trained_numbers(shapes, ranks)
    stored = sum(rank * sum(shapes[name]) for name, rank in ranks.items())  # padded where a side is smaller
    processes = len(placed.devices) if placed else len(execution_settings(recipe).devices)
    pass_bytes = 0
    if resident is False:
        pass_bytes = student.checkpoint.total_bytes * processes
    return TrainingCost(
        teacher_tokens=read,
        copies=extra.copies,
        own_text=extra.generated * length,
        weights_read=2 * teacher.checkpoint.total_bytes + student.checkpoint.total_bytes * passes,
        states_bytes=states,
        steps=steps,
        step_tokens=step_tokens,
        trial_steps=trials * trial_steps,
        trained_tokens=trained,
        measured_tokens=measured,
        read_by_student=read_by_student,
        teacher_operations=teacher_operations,
        student_operations=student_operations,
        adapter_bytes=stored * BYTES[recipe.dtype] + (_head_bytes(recipe, pair) if head_moves else 0),
        saves_bytes=SAVES_KEPT * SAVED_BYTES * (factors + moving),
        rows_bytes=_rows_bytes(recipe, read, student) * processes,
        resident=resident,
        placement=placed.reason if placed else "",
        processes=processes,
        memory_bytes=placed.memory_bytes if placed and placed.resident else 0,
        step_bytes=2 * pass_bytes,
        training_bytes=pass_bytes * (2 * (steps + trials * trial_steps) + measurements),
    )


def active_parameters(model: Model) -> tuple[int, int]:
    """Parameters of the layers and of the head that one token goes through.

    Of the routed experts only as many count as a token is sent to; embeddings are looked up and count nothing.
    """
    layout = model.layout
    outside = sum(prod(meaning.shape) for meaning in layout.meanings.values() if meaning.layer is None)
    return layout.parameters(model.shapes)[1] - outside, layout.geometry.vocabulary * layout.geometry.hidden


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


def _place(recipe: Recipe, pair: ModelPair, trained: TrainedParts) -> Placement:
    settings = execution_settings(recipe)
    return place_training(recipe, pair, settings.devices, settings.workers, trained)


def _trials(recipe: Recipe, steps: int) -> tuple[int, int]:
    """Short runs that choose the learning rate, and the steps of each."""
    from moe_svd_distill.training.trials import MULTIPLES, trial_steps, worth_trying

    tried = recipe.training.learning_rate == "auto" and worth_trying(steps)
    return (len(MULTIPLES), trial_steps(steps)) if tried else (0, 0)


def _rows_bytes(recipe: Recipe, tokens: int, student: Model) -> int:
    """What one process keeps of the teacher for a head that stands still (`training.fixed_head`)."""
    from moe_svd_distill.training.settings import needs_rows

    fixed = not trains_head(recipe, student.layout.geometry.vocabulary)
    needed = needs_rows(fixed, recipe.training.divergence)
    return 4 * tokens * (student.layout.geometry.hidden + 1) if needed else 0


def _head_bytes(recipe: Recipe, pair: ModelPair) -> int:
    """The head's share of the adapter: all of it, or a pair of the highest rank it may get."""
    from moe_svd_distill.training.head_rank import SERVED_RANKS

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
    from moe_svd_distill.streaming import PassSettings

    width = model.layout.geometry.hidden
    return width * PassSettings(execution_settings(recipe).devices).compute_dtype(width).itemsize
