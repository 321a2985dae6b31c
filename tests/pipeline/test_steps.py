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
        (65_537, "auto", ["refined"], 2.75),
        (65_537, "auto", ["weights", "refined"], 0.55),
        (8_192, "auto", ["calibrated", "refined"], 4.0),
        (8_192, 3, ["weights", "refined"], 3.0),
    ],
)
def test_passes_over_the_text(tokens: int, asked: Any, stages: list[str], expected: float) -> None:
    recipe = parse_recipe({"teacher": "t", "student": "s", "tokens": tokens, "training": {"epochs": asked}})
    assert epochs(recipe, stages) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("asked", "longest", "expected"), [("auto", 512, 512), ("auto", 128, 128), (64, 512, 64), (4096, 512, 512)]
)
def test_tokens_of_a_sequence(asked: Any, longest: int, expected: int) -> None:
    recipe = parse_recipe({"teacher": "t", "student": "s", "sequence_tokens": asked})
    assert sequence_length(recipe, longest) == expected
