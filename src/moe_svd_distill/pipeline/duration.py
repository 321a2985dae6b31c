"""What the stages of a run would take on this machine: time, memory and disk."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_svd_distill.execution.memory import peak_of
from moe_svd_distill.pipeline.cost import SAVED_BYTES, SAVES_KEPT, TrainingCost
from moe_svd_distill.pipeline.placement import LIBRARIES_BYTES, execution_settings, training_dtype
from moe_svd_distill.pipeline.speed import HeadSeconds, LayerSeconds, head_speed, layer_speed, reading_speed
from moe_svd_distill.pipeline.texts import longest_sequence, sequence_length
from moe_svd_distill.pipeline.trained_matrices import tokens_at_once, trained_ranks
from moe_svd_distill.pipeline.units import make_work
from moe_svd_distill.streaming import PassSettings
from moe_svd_distill.streaming.stream import JOURNAL_SECONDS
from moe_svd_distill.training.job import threads

if TYPE_CHECKING:
    from moe_svd_distill.pairing.plan import Pairing
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.recipe import Recipe

_READ_TOKENS = 1024  # enough of a batch to see how long a full one takes
AROUND_S = 10.0  # loading libraries, reading the text, checking and publishing the adapter
_BEST_BYTES = 4  # of a number, in the last save of a training
_PRODUCTS_OF_A_STEP = 3  # with a head that is trained: logits, slopes of the states, slopes of the weight
_PRODUCTS_BEFORE_A_FIXED_HEAD = 2


@dataclass(frozen=True)
class StageCost:
    """What a stage would take, about.

    Attributes:
        seconds: Of time.
        memory_bytes: Of all its processes, files that are mapped left out; 0 where that depends on what is free.
        disk_bytes: In the output and cache folders, at most at a time.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class PairSpeed:
    """What was measured of a pair.

    Attributes:
        teacher: Its layers as a pass reads with them.
        student: The same.
        trained: The student's layers as training has them.
        teacher_head: Its head.
        student_head: The same.
    """

    teacher: LayerSeconds
    student: LayerSeconds
    trained: LayerSeconds
    teacher_head: HeadSeconds
    student_head: HeadSeconds


def measure_pair(recipe: Recipe, pair: ModelPair) -> PairSpeed:
    """Run the first layers and the heads of both models for a moment; their weights lie on this machine.

    Raises:
        DistillError: A model cannot be run.
    """
    device, length = execution_settings(recipe).devices[0], sequence_length(recipe, longest_sequence(pair))
    settings = PassSettings((device,))
    teacher, student = (
        reading_speed(
            model.checkpoint,
            device,
            settings.compute_dtype(model.layout.geometry.hidden),
            length,
            min(_READ_TOKENS, recipe.tokens),
        )
        for model in (pair.teacher, pair.student)
    )
    trained = layer_speed(
        pair.student.checkpoint,
        device,
        training_dtype(recipe, pair, torch.device(device)),
        length,
        tokens_at_once(recipe, device),
        trained_ranks(recipe, pair.student),
    )
    heads = [head_speed(model.checkpoint, device) for model in (pair.teacher, pair.student)]
    return PairSpeed(teacher, student, trained, heads[0], heads[1])


def training_cost_here(cost: TrainingCost, speed: PairSpeed, save_seconds: float) -> StageCost:
    """What a stage on text would take; text that the student writes word by word is counted as read."""
    layers, fixed, steps = speed.trained, bool(cost.rows_bytes), cost.steps + cost.trial_steps
    mine, theirs = ((of.rounded if fixed else of.plain) for of in (speed.student_head, speed.teacher_head))
    reading = _passes(2, cost.teacher_tokens, speed.teacher)
    between_layers = cost.teacher_states_bytes if reading > JOURNAL_SECONDS else 0  # so that a killed pass goes on
    reading += _passes(cost.student_passes, cost.read_by_student, speed.student)
    if fixed:
        reading += cost.teacher_tokens * (theirs + mine)
        of_trained, of_measured = _PRODUCTS_BEFORE_A_FIXED_HEAD * mine, mine
    else:
        of_trained, of_measured = theirs + _PRODUCTS_OF_A_STEP * mine, theirs + mine
    once_more, loading = (layers.forward, 2 * steps * layers.loading) if cost.resident is False else (0.0, 0.0)
    of_layers = cost.trained_tokens * (layers.learning + once_more) + steps * layers.composing
    training = cost.share * of_layers + cost.trained_tokens * of_trained
    training = max(training, cost.share * loading)
    measuring = cost.measured_tokens * (cost.share * layers.forward + of_measured) + cost.ranked_tokens * of_measured
    trained = cost.rows_bytes + 2 * cost.adapter_bytes + _saves(cost, int(training // save_seconds))
    kept = cost.states_bytes + max(between_layers, trained)
    return StageCost(reading + training + measuring, cost.memory_bytes * cost.processes, kept)


def weights_cost_here(recipe: Recipe, pair: ModelPair, plan: Pairing, adapter_bytes: int) -> StageCost:
    """What the weights stage would take, from a unit of middle size, which is done."""
    if not plan.units:
        return StageCost(0.0, 0, 0)
    settings = execution_settings(recipe)
    by_size = sorted(plan.units, key=lambda unit: sum(task.rank * sum(task.shape) for task in unit.tasks))
    begin = time.perf_counter()
    with threads(settings.threads_per_worker), peak_of() as grown:
        make_work(recipe, pair)(by_size[len(by_size) // 2], settings.devices[0])
    workers = min(settings.workers, len(plan.units))
    seconds = (time.perf_counter() - begin) * len(plan.units) / workers
    return StageCost(seconds, workers * (LIBRARIES_BYTES + grown()), 2 * adapter_bytes)


def _saves(cost: TrainingCost, whole: int) -> int:
    """Bytes of so many whole saves, two of which are kept, beside one more that holds the best values alone."""
    numbers = cost.saves_bytes // (SAVES_KEPT * SAVED_BYTES)
    written = SAVED_BYTES * min(whole, SAVES_KEPT + 1)
    return numbers * max(written, SAVED_BYTES * min(whole, SAVES_KEPT) + _BEST_BYTES)


def _passes(count: int, tokens: int, layers: LayerSeconds) -> float:
    """Reading and computing go side by side: whichever is slower counts."""
    return max(tokens * layers.forward, count * layers.loading) if tokens else 0.0
