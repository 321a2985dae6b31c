"""What a stage on text trains, on how much text, and how: the head and the last layers, or all of the student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from moe_svd_distill.evaluation.scale_search import GLOBAL_SCALES
from moe_svd_distill.pipeline.extra_text import ExtraText, for_fit
from moe_svd_distill.pipeline.placement import (
    Placement,
    TrainedParts,
    place_training,
    tokens_at_once,
    trained_ranks,
)
from moe_svd_distill.pipeline.schedule import TextSize, schedule_training
from moe_svd_distill.pipeline.stage_text import Beginning
from moe_svd_distill.streaming import ScaledAdapter
from moe_svd_distill.training.settings import (
    HEAD_RATE,
    LAST_LAYERS_RATE,
    TrainingSettings,
    passes_over_little,
    step_over_little,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from moe_svd_distill.calibration.paired import PairedText
    from moe_svd_distill.evaluation.scale_search import ScaleSearch
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.pipeline.texts import RunText
    from moe_svd_distill.recipe import Recipe

StageName: TypeAlias = Literal["calibrated", "refined"]
_MOST_HALVINGS = 4
_SCALES_OF_A_LONG_RUN = (0.25, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class StageInput:
    """What a stage on text works with.

    Attributes:
        recipe: What is asked for.
        pair: Teacher and student.
        stages: Of the run.
        text: From ``read_run_text``, with a part to train on.
        folder: The output's folder for parts, where training is saved.
        devices: Where to compute.
        workers: Processes to use on the CPU.
        start: The adapter to begin with; None for none.
    """

    recipe: Recipe
    pair: ModelPair
    stages: tuple[str, ...]
    text: RunText
    folder: Path
    devices: tuple[str, ...]
    workers: int
    start: ScaledAdapter | None

    @property
    def fit_text(self) -> PairedText:
        """The text to train on."""
        assert self.text.fit is not None
        return self.text.fit


@dataclass(frozen=True, eq=False)
class Course:
    """How a stage goes.

    Attributes:
        stage: Its name.
        beginning: The layer that training begins at.
        keeps_start: Whether the start stays as it is beneath what is trained, or is trained on itself.
        ranks: Hub name to rank of every matrix that is trained.
        extra: What is read beside the text.
        settings: Of the training.
        tries_rates: Whether its learning rates are a guess to be tried.
        scales: That the result is tried at.
        placement: Where it is trained.
    """

    stage: StageName
    beginning: Beginning
    keeps_start: bool
    ranks: Mapping[str, int]
    extra: ExtraText
    settings: TrainingSettings
    tries_rates: bool
    scales: tuple[float, ...]
    placement: Placement


@dataclass(frozen=True, eq=False)
class HeadChange:
    """A change of the head.

    Attributes:
        factors: ``(B, A)`` as stored, (V, r) and (r, d).
        delta: Their product, float32, (V, d).
    """

    factors: tuple[Tensor, Tensor]
    delta: Tensor


@dataclass(frozen=True, eq=False)
class StageResult:
    """What a stage on text has made, and how it came about.

    Attributes:
        head: What has become of the head; None where it stands still.
        pairs: Hub name to ``(B, A)`` as stored, for every other matrix that was trained.
        search: The scale search on top of what was there before.
        record: Facts for run.json.
    """

    head: HeadChange | None
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    search: ScaleSearch
    record: dict[str, Any]


def calibrated_course(given: StageInput) -> Course:
    """The head and the last layers, on what a pass has recorded in front of them; on top of a start the head alone."""
    recipe, pair, text = given.recipe, given.pair, given.fit_text.student
    layers = pair.student.architecture.layers
    beginning = Beginning(layers - (0 if given.start is not None else min(recipe.last_layers, layers)), layers)
    ranks = trained_ranks(recipe, pair.student, range(beginning.layer, layers))
    count = len(text.sequences)
    extra = for_fit(recipe, text.tokens, count, given.fit_text.identical)
    rows, length = count + extra.sequences(count), text.length
    step_tokens = step_over_little(rows * length, head_alone=beginning.leaves_head_alone)
    if not beginning.leaves_head_alone:
        step_tokens = max(1, step_tokens // length) * length
    asked = None if recipe.fit_passes == "auto" else recipe.fit_passes
    passes = passes_over_little(asked, max(1, rows * length // step_tokens))
    share = (layers - beginning.layer) / layers
    trained = TrainedParts(ranks, True, max(1, step_tokens // length), step_tokens, share)
    placement = place_training(recipe, pair, given.devices, given.workers, trained)
    width = pair.student.architecture.head_slot.shape[1]
    settings = TrainingSettings(
        epochs=passes,
        step_tokens=step_tokens,
        batch_tokens=tokens_at_once(recipe, placement.devices[0]),
        rate=LAST_LAYERS_RATE / width,
        head_rate=HEAD_RATE / width,
        optimiser="adamw",
        checks=passes,
        patience=passes,
        halvings=_MOST_HALVINGS,
        seed=recipe.seed,
    )
    return Course("calibrated", beginning, True, ranks, extra, settings, False, GLOBAL_SCALES, placement)


def refined_course(given: StageInput) -> Course:
    """All layers, and the head where the text is enough for it; from a start or from zero."""
    recipe, pair = given.recipe, given.pair
    size = TextSize.of(given.text)
    schedule = schedule_training(recipe, pair.student, given.stages, size, given.devices[0])
    return Course(
        "refined",
        Beginning(0, pair.student.architecture.layers),
        False,
        schedule.trained.ranks,
        schedule.extra,
        schedule.settings,
        schedule.tries_rates,
        _SCALES_OF_A_LONG_RUN,
        place_training(recipe, pair, given.devices, given.workers, schedule.trained),
    )
