"""Dataclasses as JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypedDict

import pytest

from moe_svd_distill.algebra.figures import Figures, Interval
from moe_svd_distill.calibration.domain import DomainDistance
from moe_svd_distill.evaluation.continuations import Continuations
from moe_svd_distill.evaluation.result import Control, Evaluation, TemperatureControl
from moe_svd_distill.evaluation.uncertainty import GapClosed
from moe_svd_distill.files.typed import as_json, at, read_as


class Row(TypedDict, total=False):
    """A row with some of its keys."""

    name: str
    rank: int


@dataclass(frozen=True)
class Inner:
    """A value and what follows from it."""

    value: float
    word: Literal["a", "b"] | None = None

    derived: ClassVar[tuple[str, ...]] = ("twice",)

    @property
    def twice(self) -> float:
        """Two of it."""
        return 2 * self.value


@dataclass(frozen=True, kw_only=True)
class Outer:
    """One field of every kind."""

    number: int
    flag: bool
    text: str
    kept: str = "default"
    made: list[int] = field(default_factory=lambda: [7])
    inner: Inner
    perhaps: Inner | None
    either: str | list[float] | None
    rows: tuple[Row, ...]
    by_name: Mapping[str, Inner]
    far: int = at("a.b")


NOTHING = Outer(
    number=0,
    flag=False,
    text="",
    inner=Inner(math.nan),
    perhaps=None,
    either=None,
    rows=(),
    by_name={},
    far=0,
)


def _back(kind: type, value: Any) -> Any:
    return read_as(kind, json.loads(json.dumps(as_json(value), allow_nan=False)))


def test_what_is_written_is_read_and_what_is_no_number_stays_none() -> None:
    inner = Inner(math.nan, "b")
    assert as_json(Inner(2.0)) == {"value": 2.0, "word": None, "twice": 4.0}
    assert as_json(inner)["value"] is None
    assert _back(Inner, inner) == inner
    full = Outer(number=1, flag=True, text="x", kept="y", made=[1, 2], inner=inner, perhaps=Inner(1.0), either=[0.5],
                 rows=({"name": "n"}, {}), by_name={"k": inner}, far=0)  # fmt: skip
    assert _back(Outer, full) == full
    assert read_as(Outer, {"a": {"b": 5}}).far == 5


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, {"unknown": 1}, dict.fromkeys(("inner", "made", "rows", "a"))])
def test_what_is_missing_is_the_default_or_the_nothing_of_its_type(value: Any) -> None:
    assert read_as(Outer, value) == NOTHING


def test_what_is_of_another_type_is_as_good_as_missing() -> None:
    damaged = {"number": "1", "text": 2, "kept": [], "made": {}, "perhaps": [], "either": 3, "by_name": 1, "rows": "x"}
    assert read_as(Outer, damaged) == NOTHING
    assert read_as(Outer, {"rows": [{"name": 3, "rank": 4, "other": 5}, None]}).rows == ({"rank": 4}, {})
    assert read_as(Inner, {"value": 1, "word": "z"}) == Inner(1)


def test_a_whole_evaluation_comes_back_as_it_was() -> None:
    figures = Figures(0.5, 4.0, 0.6, 1000, 1, math.nan, math.nan, 0.1, Interval(0.4, 0.6))
    gap = GapClosed(34.0, None, Interval(30.0, 38.0))
    found = Evaluation(
        effect="helps",
        teacher=figures,
        student=figures,
        adapted=figures,
        gap_closed=gap,
        controls=(Control(7, figures, gap),),
        temperature_control=TemperatureControl(1.1, "half of the text", False, figures, figures, gap, gap, None),
        vocabulary=100,
        sequence_length=256,
        seconds=1.5,
        places={"teacher": "resident", "student": "streamed"},
        domain=DomainDistance(0.1, 0.0, True, 64),
        kept_states=("a", "b"),
        continuations=Continuations(("p",), {"text": ("t",)}, {"teacher": "why"}),
    )
    assert read_as(Evaluation, json.loads(json.dumps(found.as_dict(), allow_nan=False))) == found
