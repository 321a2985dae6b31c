from typing import Any

import pytest

from moe_svd_distill.pipeline.schedule import epochs, learning_rate, optimiser, trains_head
from moe_svd_distill.pipeline.texts import sequence_length
from moe_svd_distill.recipe import parse_recipe


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
    assert epochs(recipe, stages, True) == pytest.approx(expected)


@pytest.mark.parametrize(("tokens", "expected"), [(4096, 2.0), (16_383, 2.0), (16_384, 1.0), (2**20, 1.0)])
def test_passes_with_a_head_that_stands_still(tokens: int, expected: float) -> None:
    recipe = parse_recipe({"teacher": "t", "student": "s", "tokens": tokens})
    assert epochs(recipe, ["refined"], False) == expected
    assert epochs(recipe, ["weights", "refined"], False) == epochs(recipe, ["weights", "refined"], True)


@pytest.mark.parametrize(
    ("asked", "longest", "expected"), [("auto", 512, 512), ("auto", 128, 128), (64, 512, 64), (4096, 512, 512)]
)
def test_tokens_of_a_sequence(asked: Any, longest: int, expected: int) -> None:
    recipe = parse_recipe({"teacher": "t", "student": "s", "sequence_tokens": asked})
    assert sequence_length(recipe, longest) == expected


@pytest.mark.parametrize(
    ("tokens", "copies", "asked", "rows", "expected"),
    [
        (8_192, "auto", "auto", 2_048, True),  # seven copies: 32 tokens for each row
        (4_096, "auto", "auto", 151_936, False),
        (65_536, "auto", "auto", 151_936, False),
        (303_872, 1, "auto", 151_936, True),  # four tokens for each row, copies included
        (303_871, 1, "auto", 151_936, False),
        (512, "auto", "train", 151_936, True),
        (393_216, "auto", "fixed", 64, False),
    ],
)
def test_whether_the_head_moves(tokens: int, copies: Any, asked: str, rows: int, expected: bool) -> None:
    values = {"teacher": "t", "student": "s", "tokens": tokens, "copies": copies, "training": {"head": asked}}
    assert trains_head(parse_recipe(values), rows) == expected


@pytest.mark.parametrize(
    ("training", "head_moves", "moved_by", "rate"),
    [
        ({}, True, "muon", 0.6 / 128),
        ({}, False, "adamw", 0.18 / 128),
        ({"optimiser": "muon"}, False, "muon", 0.6 / 128),
        ({"optimiser": "adamw", "learning_rate": 3e-4}, True, "adamw", 3e-4),
    ],
)
def test_what_moves_the_factors_and_how_fast(
    training: dict[str, Any], head_moves: bool, moved_by: str, rate: float
) -> None:
    recipe = parse_recipe({"teacher": "t", "student": "s", "training": training})
    found = optimiser(recipe, head_moves)
    assert (found, learning_rate(recipe, found, 128)) == (moved_by, pytest.approx(rate))
