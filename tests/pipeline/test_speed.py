"""The plan's seconds: what is measured of a machine, and what is made of it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.pipeline import speed
from moe_svd_distill.pipeline.cost import TrainingCost, costs_of_training
from moe_svd_distill.pipeline.duration import (
    PairSpeed,
    measure_pair,
    training_cost_here,
    weights_cost_here,
)
from moe_svd_distill.pipeline.pair import open_model, open_pair
from moe_svd_distill.pipeline.speed import HeadSeconds, LayerSeconds, head_speed, layer_speed, reading_speed
from moe_svd_distill.pipeline.trained_matrices import trained_ranks
from moe_svd_distill.pipeline.units import plan_pair
from moe_svd_distill.streaming import Decoder
from tests.support import architectures
from tests.support.models import saved
from tests.support.pairs import LITTLE_TEXT, recipe_for


class _Clock:
    """Goes on by a second each time it is looked at."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


@pytest.mark.usefixtures("clock")
def test_all_layers_are_those_that_ran_and_more_like_the_last(tiny: tuple[Path, Path]) -> None:
    """Everything takes a second here, so seconds count layers."""
    with open_pair(*map(str, tiny)) as pair:
        checkpoint, layers = pair.student.checkpoint, pair.student.architecture.layers
        ranks = trained_ranks(recipe_for(*tiny, Path("out"), **LITTLE_TEXT), pair.student)
        found = layer_speed(checkpoint, "cpu", torch.float32, 16, 64, ranks)
        read = reading_speed(checkpoint, "cpu", torch.float32, 16, 64)
        head = head_speed(checkpoint, "cpu")
    assert found == LayerSeconds(layers, layers / 64, layers / 64, layers)
    assert read == LayerSeconds(layers, layers / 64 / torch.get_num_threads())
    assert head == HeadSeconds(1 / 128, 1 / 128)


def test_a_layer_of_each_kind_behind_the_first_is_run_and_counted_as_often_as_there_are_such(
    tmp_path: Path, clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers with experts take ten seconds more to read; those before them have none."""
    folder, entered = saved("qwen3_moe", tmp_path, num_hidden_layers=6, mlp_only_layers=[0, 1, 2]), []
    enter = Decoder.enter

    def slowly(decoder: Decoder, layer: int, following: int | None = None) -> None:
        entered.append(layer)
        clock.now += 10.0 * (layer > 2)
        enter(decoder, layer, following)

    monkeypatch.setattr(Decoder, "enter", slowly)
    with closing(open_checkpoint(str(folder))) as checkpoint:
        found = layer_speed(checkpoint, "cpu", torch.float32, 16, 64, {})
    assert entered == [0, 1, 3]
    assert found == LayerSeconds(6 + 3 * 10.0, 6 / 64)


def test_of_many_kinds_some_are_run_and_the_others_count_as_the_nearest_in_size(
    tmp_path: Path, clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer takes a second more to read than the one before, and none of them is like another."""
    sizes = [16 * (layer + 1) for layer in range(10)]
    folder, entered = architectures.saved("gemma3n_text", tmp_path, num_hidden_layers=10, **_kinds(sizes)), []
    enter = Decoder.enter

    def slowly(decoder: Decoder, layer: int, following: int | None = None) -> None:
        entered.append(layer)
        clock.now += layer
        enter(decoder, layer, following)

    monkeypatch.setattr(Decoder, "enter", slowly)
    with closing(open_checkpoint(str(folder))) as checkpoint:
        found = layer_speed(checkpoint, "cpu", torch.float32, 16, 64, {})
    assert entered == [0, 1, 3, 5, 7, 9]
    assert found.loading == 10 + sum((0, 1, 3, 3, 5, 5, 7, 7, 9, 9))


@pytest.mark.usefixtures("clock")
def test_a_layer_that_needs_what_one_left_out_hands_on_counts_as_the_nearest_in_size(tmp_path: Path) -> None:
    """The last four layers take keys and values of the second pair, of which only the first one is run."""
    changes = {"num_hidden_layers": 8, "layer_types": ["sliding_attention", "full_attention"] * 4}
    folder = architectures.saved("gemma4_text", tmp_path, num_kv_shared_layers=4, **changes)
    with closing(open_checkpoint(str(folder))) as checkpoint:
        assert layer_speed(checkpoint, "cpu", torch.float32, 16, 64, {}) == LayerSeconds(8, 8 / 64)


def _kinds(sizes: list[int]) -> dict[str, Any]:
    return {
        "intermediate_size": sizes,
        "activation_sparsity_pattern": [0.0] * len(sizes),
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * len(sizes),
    }


@pytest.mark.parametrize("model_type", ["nemotron_h", "qwen3_5_moe", "gemma4_text", "zamba2", "glm_moe_dsa"])
def test_layers_of_other_kinds_run_behind_those_that_were_left_out(model_type: str, tmp_path: Path) -> None:
    model = open_model(str(architectures.saved(model_type, tmp_path)))
    ranks = dict.fromkeys(model.keys.matrices(), 4)
    with closing(model.checkpoint):
        found = layer_speed(model.checkpoint, "cpu", torch.float32, 16, 32, ranks)
    assert min(found.loading, found.forward, found.learning, found.composing) > 0


def test_the_number_of_threads_is_what_it_was(tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []

    def look(*given: object) -> LayerSeconds:
        seen.append(torch.get_num_threads())
        raise IncompatiblePairError("It cannot be run", "Choose another")

    monkeypatch.setattr(speed, "layer_speed", look)
    with open_pair(*map(str, tiny)) as pair, pytest.raises(IncompatiblePairError):
        reading_speed(pair.teacher.checkpoint, "cpu", torch.float32, 16, 64)
    assert seen == [1]
    assert torch.get_num_threads() == before


NOTHING = LayerSeconds(0.0, 0.0)
FREE = PairSpeed(NOTHING, NOTHING, NOTHING, HeadSeconds(0.0, 0.0), HeadSeconds(0.0, 0.0))


def seconds_of_training(cost: TrainingCost, speed: PairSpeed) -> float:
    return training_cost_here(cost, speed, 120.0).seconds


def test_seconds_of_training_count_what_the_plan_counts(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_for(*tiny, tmp_path / "out", **LITTLE_TEXT)
    with open_pair(*map(str, tiny)) as pair:
        cost = costs_of_training(recipe, pair, ("refined",), at_hand=True)["refined"]
    assert not cost.rows_bytes
    assert seconds_of_training(cost, FREE) == 0.0
    reading = replace(FREE, teacher=LayerSeconds(0.0, 2.0))
    assert seconds_of_training(cost, reading) == 2.0 * cost.teacher_tokens
    waiting = replace(FREE, teacher=LayerSeconds(5.0, 1e-9))
    assert seconds_of_training(cost, waiting) == 10.0
    learning = replace(FREE, trained=LayerSeconds(0.0, 0.0, learning=1.0, composing=7.0))
    assert seconds_of_training(cost, learning) == cost.trained_tokens + 7.0 * cost.steps
    head = replace(FREE, student_head=HeadSeconds(1.0, 0.5))
    assert seconds_of_training(cost, head) == 3 * cost.trained_tokens + cost.measured_tokens + cost.ranked_tokens
    fixed = replace(cost, rows_bytes=1, ranked_tokens=0)
    assert seconds_of_training(fixed, head) == 0.5 * (
        cost.teacher_tokens + 2 * cost.trained_tokens + cost.measured_tokens
    )
    streamed = replace(FREE, trained=LayerSeconds(3.0, 0.0))
    assert seconds_of_training(replace(cost, resident=False), streamed) == 2 * 3.0 * cost.steps


def test_the_disk_holds_two_saves_and_for_a_moment_three(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_for(*tiny, tmp_path / "out", **LITTLE_TEXT)
    with open_pair(*map(str, tiny)) as pair:
        cost = costs_of_training(recipe, pair, ("refined",), at_hand=True)["refined"]
    besides, numbers = cost.states_bytes + cost.rows_bytes + 2 * cost.adapter_bytes, cost.saves_bytes // 32
    lasting = replace(FREE, trained=LayerSeconds(0.0, 0.0, learning=1 / cost.trained_tokens))  # a second of training
    disk = [training_cost_here(cost, lasting, every).disk_bytes - besides for every in (2.0, 1.0, 0.5, 0.3)]
    assert disk == [4 * numbers, 20 * numbers, 36 * numbers, 48 * numbers]


def test_the_disk_holds_what_goes_between_two_layers_of_a_long_pass(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_for(*tiny, tmp_path / "out", **LITTLE_TEXT)
    with open_pair(*map(str, tiny)) as pair:
        cost = costs_of_training(recipe, pair, ("refined",), at_hand=True)["refined"]
    cost = replace(cost, adapter_bytes=0, saves_bytes=0)
    long = replace(FREE, teacher=LayerSeconds(0.0, 20.0 / cost.teacher_tokens))
    assert training_cost_here(cost, FREE, 1.0).disk_bytes == cost.states_bytes
    assert training_cost_here(cost, long, 1.0).disk_bytes == cost.states_bytes + cost.teacher_states_bytes


@pytest.mark.parametrize("last_layers", [0, 1])
def test_seconds_of_calibrating_count_the_student_s_reading_and_its_last_layers(
    tiny: tuple[Path, Path], tmp_path: Path, last_layers: int
) -> None:
    few = {"tokens": 1536, "copies": 2, "own_text": 0, "fit_passes": 5, "last_layers": last_layers}
    recipe = recipe_for(*tiny, tmp_path / "out", **(LITTLE_TEXT | few))
    with open_pair(*map(str, tiny)) as pair:
        cost = costs_of_training(recipe, pair, ("calibrated",), at_hand=True)["calibrated"]
        layers = pair.student.layout.geometry.layers
    assert cost.trained_tokens == 5 * 3 * recipe.tokens
    assert cost.share == last_layers / layers
    reading = seconds_of_training(cost, replace(FREE, student=LayerSeconds(0.0, 1.0)))
    assert reading == recipe.tokens + cost.teacher_tokens  # to draw the copies, and to record what goes into the layers
    learning = seconds_of_training(cost, replace(FREE, trained=LayerSeconds(0.0, 0.0, learning=1.0)))
    assert learning == cost.share * cost.trained_tokens
    head = seconds_of_training(cost, replace(FREE, student_head=HeadSeconds(1.0, 9.0)))
    assert head == 3 * cost.trained_tokens + cost.measured_tokens + cost.ranked_tokens
    assert cost.ranked_tokens > 0


def test_a_real_measurement_is_finite_and_the_weights_stage_is_tried(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_for(*tiny, tmp_path / "out", **LITTLE_TEXT)
    with open_pair(*map(str, tiny)) as pair:
        found = measure_pair(recipe, pair)
        weights = weights_cost_here(recipe, pair, plan_pair(recipe, pair), 1000)
    assert weights.seconds > 0
    assert weights.memory_bytes >= 450 << 20
    assert weights.disk_bytes == 2000
    assert min(found.teacher.forward, found.student.forward, found.trained.learning, found.trained.composing) > 0
    assert min(found.teacher_head.plain, found.student_head.rounded) > 0
