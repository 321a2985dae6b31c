"""inspect of two models, and hub models of which nothing large is fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.cli.main import main
from moe_svd_distill.files.header import read_header
from tests.checkpoints.hub_server import Hub, serve
from tests.support.models import saved


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    changes: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3}
    return saved("qwen3_moe", folder / "t", seed=1, **changes), saved("qwen3_moe", folder / "s", seed=2)


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Standard output of a command that succeeds in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert not left.value.code, captured.err
    return captured.out


def test_two_models_side_by_side(models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(run(capsys, "inspect", *models, "--json"))
    assert (facts["teacher"]["hidden"], facts["student"]["hidden"]) == (48, 32)
    assert facts["relatedness"]["lineage"] == "independent"
    assert {item["name"] for item in facts["relatedness"]["differences"]} == {"layers", "hidden"}
    assert facts["method"]["without_text"]["stages"] == []
    text = run(capsys, "inspect", *models)
    assert "layers 3 → 2, hidden 48 → 32" in text
    assert text.splitlines()[-1] == f"Next: moe-svd-distill init {models[0]} {models[1]} > recipe.yaml"
    assert "lineage: independent: no sampled tensor is alike" in text
    assert "method auto without text: nothing: " in text
    assert all(f"note: {line}" in text for line in facts["relatedness"]["skipped"])


def test_plan_shows_the_relatedness_and_the_choice(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--teacher", models[0], "--student", models[1], "--output", tmp_path / "out"]
    words += ["--method", "weights"]
    outlook = json.loads(run(capsys, *words, "--json"))
    assert outlook["method"]["asked"] == "weights"
    assert outlook["method"]["stages"] == ["weights"]
    assert outlook["method"]["auto"]["stages"] == []
    text = run(capsys, *words)
    assert f"method auto: nothing: {outlook['method']['auto']['reason']}" in text
    assert "stages of this recipe: weights" in text
    assert "lineage: independent" in text


@pytest.mark.slow
def test_of_hub_models_only_headers_are_fetched(models: tuple[Path, Path], tmp_path: Path) -> None:
    with serve(Hub({"lab/teacher": models[0], "lab/student": models[1]})) as hub:
        facts = hub_json(hub, tmp_path, "inspect", "lab/teacher")
        assert (facts["hidden"], facts["layers"]) == (48, 3)
        pair = hub_json(hub, tmp_path, "inspect", "lab/teacher", "lab/student")
        assert pair["relatedness"]["lineage"] == "unknown"
        assert any("not on this machine" in line for line in pair["relatedness"]["skipped"])
        words = ("--teacher", "lab/teacher", "--student", "lab/student", "--output", str(tmp_path / "out"))
        outlook = hub_json(hub, tmp_path, "plan", *words)
        assert outlook["relatedness"]["lineage"] == "unknown"
        assert "once the weights are on this machine" in outlook["kept"]["model.embed_tokens.weight"]
        weights = [(verb, wanted) for verb, path, wanted in hub.requests if path.endswith(".safetensors")]
    assert {verb for verb, _ in weights} <= {"GET", "HEAD"}
    assert [wanted for verb, wanted in weights if verb == "GET"]
    assert all(wanted.startswith(("bytes=0-7", "bytes=8-")) for verb, wanted in weights if verb == "GET")
    assert hub.sent["lab/teacher"] % read_header(models[0] / "model.safetensors").size == 0
    assert not list(tmp_path.rglob("*.safetensors"))


def hub_json(hub: Hub, home: Path, *words: str) -> dict[str, Any]:
    """What a command answers, in a process of its own: `huggingface_hub` reads its settings when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "moe_svd_distill", *words, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
