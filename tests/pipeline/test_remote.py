"""Whole runs on models that are read by range from a stand-in for the hub: the same adapters, and each byte once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_svd_distill.files.header import read_header
from moe_svd_distill.pipeline.distill import distill
from moe_svd_distill.recipe import parse_recipe
from tests.checkpoints.hub_server import COMMIT, Hub, serve
from tests.support.heads import TRAINED, student_with_tokenizer, trained_tokenizer
from tests.support.pairs import recipe_for

MOE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4}
CALIBRATED: dict[str, Any] = {key: value for key, value in TRAINED.items() if key != "start"} | {
    "method": "calibrated",
    "fit_passes": 4,
}
WEIGHTS: dict[str, Any] = {"method": "weights", "rank": 4, "head_rank": 4, "workers": 2}


REMOTE = ("hf://org/teacher", "hf://org/student")


@dataclass
class Served:
    hub: Hub
    teacher: Path
    student: Path

    def run(self, home: Path, *arguments: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-m", "moe_svd_distill", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def distill(
        self, home: Path, output: Path, models: tuple[str, str] = REMOTE, **values: Any
    ) -> subprocess.CompletedProcess[str]:
        recipe = recipe_for(Path("teacher"), Path("student"), output, **values)
        given = {key: json.loads(recipe.model_dump_json())[key] for key in recipe.model_fields_set}
        file = output.parent / f"{output.name}.json"
        file.write_text(json.dumps({**given, "teacher": models[0], "student": models[1]}))
        return self.run(home, "distill", str(file))

    def needed(self, name: str) -> int:
        header = read_header({"teacher": self.teacher, "student": self.student}[name] / "model.safetensors")
        return header.size + sum(info.bytes for info in header.tensors.values())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = trained_tokenizer(folder / "tokenizer", 300)
    teacher = student_with_tokenizer("qwen3_moe", folder / "teacher", tokenizer, **MOE)
    student = student_with_tokenizer("qwen3_moe", folder / "student", tokenizer, **MOE)
    tensors = load_file(student / "model.safetensors")
    moved = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in tensors.items()}

    save_file(moved, student / "model.safetensors", metadata={"format": "pt"})
    with serve(Hub(repositories={"org/teacher": teacher, "org/student": student})) as hub:
        yield Served(hub, teacher, student)


@pytest.fixture(scope="module")
def weights(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the adapter of a weights run in it, during which the hub was busy and connections ended early."""
    home = tmp_path_factory.mktemp("home")
    served.hub.sent.clear()
    served.hub.hiccups["org/teacher"] = ["", "", "", "429", "503", "cut", "", "cut"]
    done = served.distill(home, home / "out", **WEIGHTS)
    assert done.returncode == 0, done.stderr
    assert served.hub.hiccups["org/teacher"] == []
    return home


def test_a_remote_weights_run_gives_the_same_adapter_and_fetches_each_byte_once(
    served: Served, weights: Path, tmp_path: Path
) -> None:
    _fetched_once(served, weights)
    distill(recipe_for(served.teacher, served.student, tmp_path / "local", **WEIGHTS))
    _same(weights / "out", tmp_path / "local")
    assert json.loads((weights / "out" / "run.json").read_text())["teacher"]["source"] == "org/teacher"
    configuration = json.loads((weights / "out" / "adapter_config.json").read_text())
    assert configuration["base_model_name_or_path"] == "org/student"


def test_a_remote_calibrated_run_gives_the_same_adapter_and_fetches_each_byte_once(
    served: Served, tmp_path: Path
) -> None:
    served.hub.sent.clear()
    done = served.distill(tmp_path / "home", tmp_path / "remote", **CALIBRATED)
    assert done.returncode == 0, done.stderr
    _fetched_once(served, tmp_path / "home")
    folders = str(served.teacher), str(served.student)
    assert served.distill(tmp_path / "home", tmp_path / "local", folders, **CALIBRATED).returncode == 0
    _same(tmp_path / "remote", tmp_path / "local")


def test_that_the_cache_stood_in_for_the_hub_is_in_the_record(served: Served, tmp_path: Path) -> None:
    home, models = tmp_path / "home", ("org/teacher", "hf://org/student")
    assert served.distill(home, tmp_path / "out", models, **WEIGHTS).returncode == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["teacher"]["notes"], record["student"]["notes"]) == ([], [])
    done = served.run(home, "distill", str(tmp_path / "out.json"), offline=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    for role in ("teacher", "student"):
        (note,) = record[role]["notes"]
        assert note.startswith(f"the hub cannot be reached for org/{role} (")
        assert note.endswith(f"; commit {COMMIT} of its cache is read")
        assert note in done.stderr


def _fetched_once(served: Served, home: Path) -> None:
    for name in ("teacher", "student"):
        assert served.hub.sent[f"org/{name}"] <= 1.01 * served.needed(name)
    kept = home / "moe-svd-distill"
    assert {path.parent.name for path in kept.rglob("*.safetensors") if path.is_file()} == {"headers"}


def _same(first: Path, second: Path) -> None:
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


def test_inspect_fetches_headers_alone(served: Served, tmp_path: Path) -> None:
    served.hub.sent.clear()
    done = served.run(tmp_path / "home", "inspect", "hf://org/teacher", "--json")
    assert done.returncode == 0, done.stderr
    assert served.hub.sent["org/teacher"] == read_header(served.teacher / "model.safetensors").size


def test_no_more_lies_on_the_disk_than_is_allowed(served: Served, tmp_path: Path) -> None:
    largest = max(info.bytes for info in read_header(served.teacher / "model.safetensors").tensors.values())
    allowed, seen, ended = 3 * largest, {"teacher": [0], "student": [0]}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            for name, sizes in seen.items():
                sizes.append(_bytes_below(tmp_path / "home" / "moe-svd-distill" / f"hf--org--{name}", "tensors"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = served.distill(tmp_path / "home", tmp_path / "out", **WEIGHTS, remote_cache_gb=allowed / 10**9)
    finally:
        ended.set()
        watcher.join()
    assert done.returncode == 0, done.stderr
    for name, sizes in seen.items():
        assert largest / 2 < max(sizes) <= allowed < served.needed(name)


def _bytes_below(folder: Path, name: str) -> int:
    total = 0
    for path in folder.glob(f"*/*/{name}/*/*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_text_that_is_not_there_is_found_before_anything_is_asked(served: Served, tmp_path: Path) -> None:
    before = len(served.hub.requests)
    done = served.run(
        tmp_path / "home", "distill", "--teacher", "org/teacher", "--student", "hf://org/student",
        "--output", str(tmp_path / "out"), "--calibration", str(tmp_path / "nothing"),
    )  # fmt: skip
    assert done.returncode == 66
    assert "nothing does not exist" in done.stderr
    assert len(served.hub.requests) == before


def test_a_remote_student_is_evaluated_and_not_merged(served: Served, weights: Path, tmp_path: Path) -> None:
    arguments = [
        "--teacher",
        "hf://org/teacher",
        "--student",
        "hf://org/student",
        "--text",
        CALIBRATED["calibration"][0],
    ]
    done = served.run(weights, "evaluate", str(weights / "out"), *arguments, "--json", "--tokens", "600")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["held_out"]["documents_used"] == 0
    merged = served.run(
        weights, "merge", str(weights / "out"), str(tmp_path / "merged"), "--student", "hf://org/student"
    )
    assert merged.returncode == 2
    assert "not on this machine" in merged.stderr


def test_recipes_take_addresses() -> None:
    recipe = parse_recipe({"teacher": "hf://org/teacher", "student": "s3://bucket/model", "output": "out"})
    assert (recipe.teacher, recipe.student) == ("hf://org/teacher", "s3://bucket/model")
