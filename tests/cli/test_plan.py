"""plan: presets, the stages of method refined, and what training would cost."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from moe_svd_distill.pipeline.pair import open_model
from tests.support import architectures
from tests.support.commands import run
from tests.support.heads import TEXT, student_with_tokenizer, trained_tokenizer, with_tokenizer
from tests.support.models import saved


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What every plan here begins with."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = trained_tokenizer(folder / "tokenizer", 400)
    student = student_with_tokenizer("qwen3_moe", folder / "s", tokenizer)
    teacher = with_tokenizer(saved("qwen3_moe", folder / "t", seed=2, dtype=torch.float32, vocab_size=400), tokenizer)
    (folder / "text.jsonl").write_text("\n".join(TEXT.read_text(encoding="utf-8").splitlines()[:24]))
    rest = ("--output", folder / "out", "--calibration", folder / "text.jsonl", "--device", "cpu", "--workers", "1")
    return ["plan", "--teacher", str(teacher), "--student", str(student), *map(str, rest)]


def errors_in(error: str) -> list[str]:
    """What a command says at its end, without its progress."""
    return [line for line in error.splitlines() if line.startswith("moe-svd-distill: ")]


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
        assert f"\n{row}  " in text.partition("\nrefined stage")[2]


def test_the_same_as_json_and_from_the_environment(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_SVD_DISTILL_PRESET", "balanced")
    outlook = json.loads(run(capsys, *words, "--json")[1])
    supplied, read = {"method": "refined", "tokens": 131_072}, outlook["text"]["text"]
    assert outlook["preset"] == {"name": "balanced", "supplied": supplied, "given_otherwise": {}}
    assert outlook["method"]["asked"] == "refined"
    assert {part: facts["tokens_asked"] for part, facts in read.items()} == {
        "fit": 131_072, "check": 4_096, "search": 16_384,
    }  # fmt: skip
    cost, tokens = outlook["refined"], {part: facts["tokens"] for part, facts in read.items()}
    assert 0 < tokens["fit"] < 131_072  # what there is is costed, not what is asked for
    copied = cost["copies"] * tokens["fit"] + cost["own_text"]
    assert cost["teacher_tokens"] <= sum(tokens.values()) + copied
    assert any(f"fit text: {tokens['fit']:,} tokens instead of the 131,072" in note for note in outlook["warnings"])
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
        (["--preset", "fastest"], 2, "the command line: preset: expected fast, balanced or best, found 'fastest'"),
        (["--method", "refined", "--start", "nowhere"], 66, "start nowhere holds no adapter"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    given: list[str], expected: int, named: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, *words, *given)
    assert (code, len(errors_in(error))) == (expected, 1)
    assert named in error


def test_a_preset_that_trains_needs_text(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    begin = words.index("--calibration")
    code, _, error = run(capsys, *words[:begin], "--preset", "balanced")
    assert code == 2
    assert "method refined needs calibration text. Give calibration" in error


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


def test_a_plan_refuses_what_the_run_would_refuse(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    for given, expected, named in [
        (["--calibration", str(tmp_path / "none.jsonl")], 66, "none.jsonl"),
        (["--output", str(foreign)], 73, "thesis.tex"),
        (["--device", "cuda:63"], 2, "cuda:63"),
    ]:
        for command in (["plan"], ["distill", "--dry-run"], ["distill"]):
            code, _, error = run(capsys, *command, *words[1:], *given)
            assert (code, named in error) == (expected, True), error
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_a_dry_run_is_the_plan_and_leaves_nothing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, text, error = run(capsys, "distill", "--dry-run", *words[1:])
    assert code == 0, error
    for row in ("to train on", "to search the scale on", "on this machine, about", "free now"):
        assert row in text
    assert not re.search(r"(?<!\d)0\.0 GiB", text)
    assert all(", for " in line for line in error.splitlines()), "stages that last a while, and nothing else"
    (line,) = [line for line in text.splitlines() if line.startswith("Next: ")]
    assert shlex.split(line)[1:] == ["moe-svd-distill", "distill", *words[1:]]
    assert not Path(words[words.index("--output") + 1]).exists()
    assert all(len(row) <= 80 for row in text.splitlines() if "│" in row or "━" in row or "─" in row)


def test_a_student_larger_than_its_teacher_is_warned_of(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = saved("qwen3_moe", tmp_path / "large", seed=3, num_hidden_layers=4, vocab_size=400)
    text = run(
        capsys,
        "plan",
        "--teacher",
        words[2],
        "--student",
        str(large),
        "--method",
        "weights",
        "--output",
        str(tmp_path / "o"),
    )[1]
    assert "the student is larger than its teacher" in text
    assert "are they swapped?" in text
