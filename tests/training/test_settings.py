"""How many steps a training has, and how often it is measured."""

from __future__ import annotations

from typing import Literal

import pytest

from moe_svd_distill.training.settings import affordable_checks, optimiser_steps


@pytest.mark.parametrize(
    ("tokens", "passes", "asked", "expected"),
    [
        (131_072, 3, "auto", (768, 512)),  # the smallest step
        (393_216, 7, "auto", (2688, 1024)),  # 896 tokens, in whole sequences
        (2**26, 4, "auto", (4096, 65_536)),  # the largest step
        (2**26, 4, 1 << 20, (256, 1 << 20)),
        (1024, 0.1, "auto", (1, 512)),
        (1024, 2, 4096, (2, 1024)),  # no step is larger than the text
    ],
)
def test_steps_of_the_optimiser(
    tokens: int, passes: float, asked: int | Literal["auto"], expected: tuple[int, int]
) -> None:
    assert optimiser_steps(asked, passes, tokens, 512) == expected


@pytest.mark.parametrize(
    ("trained", "measured", "asked", "expected"),
    [
        (512 * 512, 4_096, 12, 12),
        (32 * 512, 1_024, 12, 6),  # an eighth of three times the tokens trained on
        (32 * 512, 4_096, 1, 1),
        (512, 4_096, 12, 2),
    ],
)
def test_how_often_the_student_is_measured(trained: int, measured: int, asked: int, expected: int) -> None:
    assert affordable_checks(asked, trained, measured) == expected
