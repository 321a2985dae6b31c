"""The command line: exit codes, one-line errors, and the whole way through on a tiny pair."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from moe_svd_distill.cli.main import COMMANDS
from moe_svd_distill.pipeline.pair import open_model
from tests.support.commands import run
from tests.support.models import load, logits, saved
from tests.support.pairs import with_tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return saved("qwen3_moe", folder / "t", seed=1), saved("qwen3_moe", folder / "s", seed=2, max_shard_size="20KB")


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; sys.argv=['moe-svd-distill','--help']\n"
        "from moe_svd_distill.cli import main\n"
        "try: main()\n"
        "except SystemExit as left: assert left.code in (0, None)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("before", [None, "5"])
def test_waiting_threads_spin_for_a_while_unless_told_otherwise(before: str | None) -> None:
    code = (
        "import os, sys; sys.argv=['moe-svd-distill','--help']\n"
        "from moe_svd_distill.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(os.environ['GOMP_SPINCOUNT'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"GOMP_SPINCOUNT": before} if before else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == (before or "100000")


def test_inspect_reads_headers_without_torch(models: tuple[Path, Path]) -> None:
    code = (
        f"import sys; sys.argv=['moe-svd-distill','inspect',{str(models[0])!r},'--json']\n"
        "from moe_svd_distill.cli import main\n"
        "try: main()\n"
        "except SystemExit as left: assert left.code in (0, None)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert (facts["family"], facts["experts"], facts["layers"]) == ("qwen3_moe", 4, 2)


def weights_alone(teacher: Path, student: Path, rank: int) -> list[str | Path]:
    """Options of a run of the weights stage on one worker of the CPU."""
    run = ["--method", "weights", "--device", "cpu", "--workers", "1"]
    return ["--teacher", teacher, "--student", student, "--rank", str(rank), *run]


def test_init_writes_a_recipe_that_distill_takes(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(capsys, "init", *models)
    assert code == 0
    content = (
        yaml.safe_load(text)
        | {"output": str(tmp_path / "out"), "rank": 4, "workers": 1, "devices": ["cpu"]}
        | {"method": "weights"}
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    code, out, _ = run(capsys, "distill", tmp_path / "recipe.yaml", "--json")
    assert code == 0
    assert json.loads(out)["transferred"] is None


def test_the_whole_way(models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, student = models
    out, merged = tmp_path / "out", tmp_path / "merged"
    words = weights_alone(teacher, student, rank=4)
    code, text, _ = run(capsys, "plan", *words, "--output", out)
    assert code == 0
    assert "recipe: head" not in text
    assert re.search(r"role +changed +unchanged +rank", text)
    code, text, _ = run(capsys, "distill", *words, "--output", out)
    assert code == 0
    assert "matrices unchanged" in text
    assert "matrices kept" not in text
    assert "whether this adapter helps or harms is not known" in text
    code, text, _ = run(capsys, "verify", out)
    assert code == 0
    assert "valid" in text
    code, text, _ = run(capsys, "verify", out, "--json")
    assert json.loads(text)["load"]["missing"] == []
    code, text, _ = run(capsys, "merge", out, merged)
    assert code == 0
    from peft import PeftModel

    adapted = logits(PeftModel.from_pretrained(load(student), str(out)))
    assert torch.allclose(logits(load(merged)), adapted, atol=0.05)
    code, text, _ = run(capsys, "adapter-config", out / "adapter_model.safetensors", "--student", student)
    rebuilt, written = json.loads(text), json.loads((out / "adapter_config.json").read_text())
    assert {**rebuilt, "base_model_name_or_path": ""} == {**written, "base_model_name_or_path": ""}
    code, text, _ = run(capsys, "export", out, tmp_path / "fused", "--format", "fused", "--json")
    assert code == 0
    assert json.loads(text)["loads"] is True
    code, text, _ = run(capsys, "export", out, tmp_path / "plain", "--format", "plain")
    assert code == 0
    assert "--max-lora-rank" in text
    assert run(capsys, "export", out, tmp_path / "plain")[0] == 73
    if find_spec("gguf"):
        code, text, _ = run(capsys, "export", out, tmp_path / "gguf", "--format", "gguf")
        assert code == 0
        assert "PEFT" not in text
        assert f"--lora {tmp_path / 'gguf' / 'adapter_model.gguf'}" in text
    code, text, _ = run(capsys, "clean", out)
    assert "would be deleted" in text
    assert any((out / "parts").iterdir())
    code, text, _ = run(capsys, "clean", out, "--yes")
    assert code == 0
    assert not (out / "parts").exists() or not any((out / "parts").glob("part-*"))
    assert run(capsys, "verify", out)[0] == 0


def test_the_next_command_can_be_copied_where_a_path_has_spaces(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "the teacher"
    shutil.copytree(models[0], teacher)
    out = tmp_path / "an output"
    words = weights_alone(teacher, models[1], rank=2)
    code, text, _ = run(capsys, "distill", *words, "--output", out)
    assert code == 0
    (line,) = [line for line in text.splitlines() if line.startswith("Next: ")]
    assert shlex.split(line)[3:5] == [str(out), "--text"]


def test_another_student_of_the_same_shapes_is_noticed(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = models
    out, other = tmp_path / "out", saved("qwen3_moe", tmp_path / "other", seed=3)
    words = weights_alone(teacher, student, rank=2)
    assert run(capsys, "distill", *words, "--output", out)[0] == 0
    copy = shutil.copytree(student, tmp_path / "copy")
    for command in (["verify", out], ["merge", out, tmp_path / "m"], ["export", out, tmp_path / "e"]):
        for number, (given, noticed) in enumerate([(copy, False), (other, True)]):
            again = [*command[:2], *[Path(f"{path}{number}") for path in command[2:]]]
            code, text, _ = run(capsys, *again, "--student", given)
            assert code == 0
            assert ("has other weights than the student the adapter was made for" in text) == noticed


BAD = [
    ("unknown option", ["distill", "--rnak", "3"], 2, "rnak"),
    ("unknown command", ["destill"], 2, "destill"),
    ("rank 0", ["distill", "--teacher", "{t}", "--student", "{s}", "--rank", "0"], 2, "rank"),
    ("rank word", ["distill", "--teacher", "{t}", "--student", "{s}", "--rank", "lots"], 2, "lots"),
    ("no student", ["distill", "--teacher", "{t}"], 2, "student"),
    ("missing folder", ["distill", "--teacher", "{tmp}/none", "--student", "{s}"], 66, "none"),
    ("missing recipe", ["distill", "{tmp}/none.yaml"], 66, "none.yaml"),
    ("missing adapter", ["verify", "{tmp}/none"], 66, "none"),
    ("no adapter there", ["merge", "{s}", "{tmp}/merged"], 66, "adapter_config.json"),
    ("nothing to clean", ["clean", "{tmp}/none"], 66, "none"),
    ("no cuda", ["distill", "--teacher", "{t}", "--student", "{s}", "--device", "cuda:63"], 2, "cuda:63"),
]


def _errors(said: str) -> int:
    """Lines that say what is wrong, with nothing but a step of the run before them."""
    lines = said.strip().splitlines()
    return len([line for line in lines if not line.startswith("fetching and checking the models")])


@pytest.mark.parametrize(("name", "words", "expected", "named"), BAD, ids=[row[0] for row in BAD])
def test_bad_input_is_one_line_with_its_exit_code(
    name: str,
    words: list[str],
    expected: int,
    named: str,
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"t": str(models[0]), "s": str(models[1]), "tmp": str(tmp_path)}
    filled = [word.format(**places) for word in words]
    if "distill" in filled:
        filled += ["--output", str(tmp_path / "out")]
    code, _, error = run(capsys, *filled)
    assert code == expected, error
    assert named in error
    assert _errors(error) == 1, error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_missing_shard_and_a_contradicting_index(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    sharded = tmp_path / "sharded"
    load(models[1], torch.bfloat16).save_pretrained(sharded, max_shard_size="20KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    lacking = shutil.copytree(sharded, tmp_path / "lacking")
    (lacking / shards[1].name).unlink()
    code, _, error = run(capsys, "distill", "--teacher", models[0], "--student", lacking, "--output", tmp_path / "o")
    assert (code, shards[1].name in error, _errors(error)) == (66, True, 1), error

    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    name = next(name for name, file in index["weight_map"].items() if file == shards[0].name)
    index["weight_map"][name] = shards[1].name
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    code, _, error = run(capsys, "distill", "--teacher", models[0], "--student", sharded, "--output", tmp_path / "o")
    assert (code, name in error, _errors(error)) == (65, True, 1), error


def test_an_unknown_architecture(models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_model(str(models[0])).checkpoint
    strange = with_tensors(models[0], tmp_path / "strange", {name: checkpoint.read(name) for name in checkpoint})
    config = json.loads((strange / "config.json").read_text()) | {"model_type": "kimi_k3"}
    (strange / "config.json").write_text(json.dumps(config))
    code, _, error = run(capsys, "distill", "--teacher", models[1], "--student", strange, "--output", tmp_path / "o")
    assert code == 65
    assert "kimi_k3" in error


def test_errors_as_json_and_tracebacks_only_when_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, error = run(capsys, "verify", tmp_path / "none", "--json")
    assert (code, json.loads(out)["exit_code"], error) == (66, 66, "")
    _, _, error = run(capsys, "--debug", "verify", tmp_path / "none")
    assert "Traceback" in error
