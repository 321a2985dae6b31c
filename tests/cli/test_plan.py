"""plan: presets, the stages of method refined, and what training would cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_svd_distill.cli.main import main
from moe_svd_distill.pipeline.pair import open_model
from tests.support import architectures
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
    assert outlook["refined"]["teacher_tokens"] == 131_072 + outlook["refined"]["own_text"] + 4096 + 16_384
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


def test_every_pairing_and_every_unmatched_tensor_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = architectures.saved("phi3", tmp_path / "t", seed=1, num_hidden_layers=2)
    student = architectures.saved("qwen3_next", tmp_path / "s", seed=2)
    words = ["plan", "--teacher", str(teacher), "--student", str(student), "--method", "weights"]
    words += ["--output", str(tmp_path / "out")]
    outlook = json.loads(run(capsys, *words, "--json")[1])
    layout = open_model(str(student)).layout
    assert {*outlook["pairings"], *outlook["kept"]} == set(layout.meanings)
    assert set(outlook["ignored_student"]) == set(layout.without_role)
    text = run(capsys, *words)[1]
    assert outlook["pairings"] == {"lm_head.weight": "1.00 × lm_head.weight"}
    assert "lm_head.weight: from 1.00 × lm_head.weight\n" in text
    assert "teacher: model.layers.0.self_attn.qkv_proj.weight.q: no student tensor is made from it\n" in text
    assert "model.layers.3.mlp.experts.*.up_proj.weight (4): teacher layer 1 has no routed experts\n" in text
    assert "linear_attn.out_proj.weight: not paired: linear attention, state space and convolution have no" in text
    dense = architectures.saved("llama", tmp_path / "l", seed=2)
    outlook = json.loads(run(capsys, *words[:3], "--student", str(dense), *words[5:], "--json")[1])
    part = "model.layers.{}.mlp.gate_up_proj.weight.gate"
    made_from = outlook["pairings"]["model.layers.1.mlp.gate_proj.weight"]
    assert made_from == f"0.50 × {part.format(0)} + 0.50 × {part.format(1)}"
