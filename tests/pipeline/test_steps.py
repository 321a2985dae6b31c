from typing import Any

import pytest

from moe_svd_distill.pipeline.steps import epochs, optimiser_steps, sequence_length
from moe_svd_distill.recipe import parse_recipe


@pytest.mark.parametrize(
    ("tokens", "training", "expected"),
    [
        (131_072, {"epochs": 3}, (768, 512)),  # the smallest step
        (393_216, {"epochs": 7}, (2688, 1024)),  # 896 tokens, in whole sequences
        (2**26, {"epochs": 4}, (4096, 65_536)),  # the largest step
        (2**26, {"epochs": 4, "step_tokens": 1 << 20}, (256, 1 << 20)),
        (1024, {"epochs": 0.1}, (1, 512)),
        (1024, {"epochs": 2, "step_tokens": 4096}, (2, 1024)),  # no step is larger than the text
    ],
)
def test_steps_of_the_optimiser(tokens: int, training: dict[str, Any], expected: tuple[int, int]) -> None:
    recipe = parse_recipe({"teacher": "t", "student": "s", "training": training})
    assert optimiser_steps(recipe, epochs(recipe, ["refined"]), tokens, 512) == expected


@pytest.mark.parametrize(
    ("tokens", "asked", "stages", "expected"),
    [
        (65_536, "auto", ["refined"], 4.0),
        (65_537, "auto", ["refined"], 3.0),
        (65_537, "auto", ["weights", "refined"], 0.6),
        (8_192, "auto", ["calibrated", "refined"], 4.0),
        (8_192, 3, ["weights", "refined"], 3.0),
    ],
)
def test_passes_over_the_text(tokens: int, asked: Any, stages: list[str], expected: float) -> None:
    recipe = parse_recipe({"teacher": "t", "student": "s", "tokens": tokens, "training": {"epochs": asked}})
    assert epochs(recipe, stages) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "stages", "longest", "expected"),
    [
        ({}, ["calibrated"], 512, 512),
        ({}, ["calibrated", "refined"], 512, 256),  # steps of 512 tokens
        ({"tokens": 2**20}, ["refined"], 512, 512),  # of 1,024
        ({"tokens": 800_000}, ["refined"], 512, 256),  # of 781
        ({"training": {"step_tokens": 4096}}, ["refined"], 512, 512),
        ({"training": {"step_tokens": 64}}, ["refined"], 512, 256),
        ({}, ["refined"], 128, 128),
        ({"sequence_tokens": 64}, ["refined"], 512, 64),
        ({"sequence_tokens": 64}, ["weights"], 512, 64),
        ({"sequence_tokens": 4096}, ["calibrated"], 512, 512),
    ],
)
def test_tokens_of_a_sequence(values: dict[str, Any], stages: list[str], longest: int, expected: int) -> None:
    recipe = parse_recipe({"teacher": "t", "student": "s"} | values)
    assert sequence_length(recipe, stages, longest) == expected
