"""plan: presets, the stages of method refined, and what training would cost."""

from __future__ import annotations

import json

import pytest

from moe_svd_distill.cli.main import main
from tests.support.models import saved


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What every plan here begins with."""
    folder = tmp_path_factory.mktemp("models")
    models = (
        "--teacher",
        saved("qwen3_moe", folder / "t", seed=1),
        "--student",
        saved("qwen3_moe", folder / "s", seed=2),
    )
    rest = ("--output", folder / "out", "--calibration", folder / "text.txt", "--device", "cpu", "--workers", "1")
    return ["plan", *map(str, models), *map(str, rest)]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command run in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(list(words))
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_a_preset_is_named_with_what_it_supplies(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, text, error = run(capsys, *words, "--preset", "best", "--tokens", "4096")
    assert code == 0, error
    assert "preset best: method refined, tokens 4096 (given otherwise)\n" in text
    assert "and refined" in next(line for line in text.splitlines() if line.startswith("stages of this recipe:"))
    for row in (
        "tokens read",
        "steps",
        "tokens trained on",
        "operations of the student",
        "adapter, at most",
        "student",
    ):
        assert f"refined stage: {row}" in text


def test_the_same_as_json_and_from_the_environment(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_SVD_DISTILL_PRESET", "balanced")
    outlook = json.loads(run(capsys, *words, "--json")[1])
    supplied = {"method": "refined", "tokens": 131_072}
    assert outlook["preset"] == {"name": "balanced", "supplied": supplied, "given_otherwise": {}}
    assert outlook["method"]["asked"] == "refined"
    assert outlook["refined"]["teacher_tokens"] == 131_072 + outlook["refined"]["own_text"] + 16_384
    outlook = json.loads(run(capsys, *words, "--preset", "fast", "--json")[1])
    assert (outlook["preset"]["name"], outlook["refined"]) == ("fast", None)


def test_without_a_preset_none_is_shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "preset" not in run(capsys, *words)[1]
    assert json.loads(run(capsys, *words, "--json")[1])["preset"] is None


@pytest.mark.parametrize(("start", "stages"), [("zero", "refined"), ("weights", "weights and refined")])
def test_the_start_decides_the_stages(
    start: str, stages: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"stages of this recipe: {stages}\n" in run(capsys, *words, "--method", "refined", "--start", start)[1]


@pytest.mark.parametrize(
    ("given", "expected", "named"),
    [
        (["--preset", "fastest"], 2, "preset: Input should be 'fast', 'balanced' or 'best', found 'fastest'"),
        (["--method", "refined", "--start", "nowhere"], 66, "start nowhere holds no adapter"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    given: list[str], expected: int, named: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, *words, *given)
    assert (code, len(error.strip().splitlines())) == (expected, 1)
    assert named in error


def test_a_preset_that_trains_needs_text(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    begin = words.index("--calibration")
    code, _, error = run(capsys, *words[:begin], "--preset", "balanced")
    assert code == 2
    assert "method refined needs calibration text: give calibration" in error
