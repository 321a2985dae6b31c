"""Hub models, against a stand-in for the hub on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.builders import CONFIG, read_index, shard_name, tiny_tensors, write_index, write_model
from tests.checkpoints.hub_server import COMMIT, FILES_ONLY, Hub, serve

SECRET = "hf_averysecrettoken"
FIRST, SECOND = shard_name(1, 2), shard_name(2, 2)
# `huggingface_hub` reads its settings when it is imported, so each group of questions has a process of its own.
SCRIPT = """
import json, sys
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import DistillError
for question in json.load(sys.stdin):
    try:
        found = open_checkpoint(**question)
        answer = {"tensors": sorted(found), "commit": found.commit, "folder": str(found.folder)}
    except DistillError as error:
        answer = {"error": str(error), "exit_code": error.exit_code}
    print(json.dumps(answer), flush=True)
sys.exit("torch was imported" if "torch" in sys.modules else 0)
"""


def ask(url: str, home: Path, *models: str, headers_only: bool = False, offline: bool = False) -> list[dict[str, Any]]:
    """Open models in another process; the answers in order, each with all notes that were logged."""
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_TOKEN": SECRET,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "NO_PROXY": "127.0.0.1",
    }
    questions = json.dumps([{"model": model, "headers_only": headers_only} for model in models])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=questions, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    return [{**json.loads(line), "said": said} for line in done.stdout.splitlines()]


@dataclass
class Asked:
    """The answers to one group of questions, and what the stand-in was asked for each of them."""

    answers: dict[str, dict[str, Any]]
    requests: list[tuple[str, str, str]]
    home: Path

    def gets(self, repo: str) -> list[tuple[str, str]]:
        """The files of a repository that were downloaded, with the range."""
        start = f"/{repo}/resolve/"
        return sorted(
            (path.rpartition("/")[2], wanted) for verb, path, wanted in self.requests if verb == "GET" and start in path
        )


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    model = write_model(root / "model", shards=2)
    (model / "tokenizer.json").write_text("{}")
    (model / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
    (model / "original").mkdir()
    (model / "original" / "model.safetensors").write_bytes(b"once more")
    (model / "pytorch_model.bin").write_bytes(b"and once more")
    quantised = write_model(root / "quantised", config=CONFIG | {"quantization_config": {"quant_method": "quip"}})
    pickled = write_model(root / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    lacking = write_model(root / "lacking", shards=2)
    (lacking / SECOND).unlink()
    broken = write_model(root / "broken", shards=2)
    (broken / FIRST).write_bytes(b"not a safetensors file, of course")
    hostile = write_model(root / "hostile", shards=2)
    write_index(hostile, read_index(hostile) | {"a": "../../../outside.safetensors"})
    huge = write_model(root / "huge")
    (huge / "model.safetensors").write_text(str(10**17))
    many = {f"model.layers.{number}.some.long.name.to.fill.the.header.weight": torch.zeros(1) for number in range(4000)}
    folders = {
        "model": model,
        "quantised": quantised,
        "pickled": pickled,
        "lacking": lacking,
        "broken": broken,
        "hostile": hostile,
        "many": write_model(root / "many", tensors=many),
        "bare": write_model(root / "bare", config=None),
        "norange": model,
        "huge": huge,
        "cut": model,
        "flaky": model,
    }
    served = Hub(
        repositories={f"org/{name}": folder for name, folder in folders.items()},
        failures={
            "org/gated": (403, "GatedRepo"),
            "org/private": (401, "RepoNotFound"),
            "org/denied": (403, ""),
            "org/badtoken": (401, ""),
            "org/down": (503, ""),
            "org/busy": (429, ""),
            "org/flaky": (403, FILES_ONLY),
        },
        ignores_ranges={"org/norange"},
        cuts_off={"org/cut"},
    )
    with serve(served):
        yield served


FULL = [
    "org/model",
    "org/model@v1",
    f"org/model@{COMMIT}",
    "org/model@gone",
    "org/nothing",
    "org/quantised",
    "org/pickled",
    "org/lacking",
    "org/broken",
    "org/hostile",
    "org/bare",
    "org/gated",
    "org/private",
    "org/denied",
    "org/badtoken",
    "org/down",
    "org/busy",
    "org/flaky",
    "org/huge",
]


@pytest.fixture(scope="module")
def full(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Every model, opened as a whole."""
    home, begin = tmp_path_factory.mktemp("home"), len(hub.requests)
    answers = ask(hub.url, home, *FULL)
    return Asked(dict(zip(FULL, answers, strict=True)), hub.requests[begin:], home)


HEADERS = ["org/model", "org/many", "org/broken", "org/norange", "org/cut", "org/quantised", "org/lacking", "org/down"]


@pytest.fixture(scope="module")
def headers(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Models of which only the headers are fetched."""
    home, begin = tmp_path_factory.mktemp("home"), len(hub.requests)
    answers = ask(hub.url, home, *HEADERS, headers_only=True)
    return Asked(dict(zip(HEADERS, answers, strict=True)), hub.requests[begin:], home)


def test_model_is_fetched_and_pinned_to_a_commit(full: Asked) -> None:
    for model in ("org/model", "org/model@v1", f"org/model@{COMMIT}"):
        assert full.answers[model]["tensors"] == sorted(tiny_tensors())
        assert full.answers[model]["commit"] == COMMIT


def test_only_the_needed_files_are_fetched_and_each_once(full: Asked) -> None:
    expected = ["config.json", FIRST, SECOND, "model.safetensors.index.json", "tokenizer.json"]
    assert [name for name, _ in full.gets("org/model")] == expected


@pytest.mark.parametrize(
    ("model", "exit_code", "words"),
    [
        ("org/model@gone", 66, "no such revision"),
        ("org/nothing", 66, "neither a folder here nor a model"),
        ("org/private", 66, "hf auth login"),
        ("org/gated", 66, "is gated. Accept its terms on the hub"),
        ("org/lacking", 66, f"'{SECOND}' of org/lacking is missing"),
        ("org/bare", 66, "config.json"),
        ("org/quantised", 65, "quant_method=quip"),
        ("org/pickled", 65, "Convert the model to safetensors"),
        ("org/broken", 65, FIRST),
        ("org/hostile", 65, "no plain path inside the model's folder"),
        ("org/denied", 69, "status 403"),
        ("org/badtoken", 69, "status 401"),
        ("org/down", 69, "status 503"),
        ("org/busy", 69, "status 429"),
        ("org/flaky", 69, "status 403"),
        ("org/huge", 73, "read it by range: hf://org/huge"),
    ],
)
def test_refusal(full: Asked, model: str, exit_code: int, words: str) -> None:
    answer = full.answers[model]
    assert words in answer["error"]
    assert answer["exit_code"] == exit_code
    assert "\n" not in answer["error"]


@pytest.mark.parametrize("model", ["org/quantised", "org/pickled", "org/lacking", "org/hostile", "org/bare"])
def test_what_the_small_files_rule_out_is_not_downloaded(full: Asked, model: str) -> None:
    assert not [name for name, _ in full.gets(model) if name.endswith((".safetensors", ".bin"))]


def test_headers_only(headers: Asked) -> None:
    assert headers.answers["org/model"]["tensors"] == sorted(tiny_tensors())
    assert headers.answers["org/model"]["commit"] == COMMIT
    weights = [(name, wanted) for name, wanted in headers.gets("org/model") if name.endswith(".safetensors")]
    assert [(name, wanted.partition("-")[0]) for name, wanted in weights] == [
        (FIRST, "bytes=0"), (FIRST, "bytes=8"), (SECOND, "bytes=0"), (SECOND, "bytes=8")
    ]  # fmt: skip
    folder = Path(headers.answers["org/model"]["folder"])
    assert not list(folder.glob("*.safetensors"))


def test_a_long_header(headers: Asked) -> None:
    assert len(headers.answers["org/many"]["tensors"]) == 4000
    ranges = [wanted for name, wanted in headers.gets("org/many") if name == "model.safetensors"]
    assert len(ranges) == 2
    assert ranges[1].startswith("bytes=8-")


@pytest.mark.parametrize(
    ("model", "exit_code", "words"),
    [
        ("org/broken", 65, FIRST),
        ("org/norange", 69, "does not send a part"),
        ("org/cut", 69, "sent 20 bytes"),
        ("org/quantised", 65, "quant_method=quip"),
        ("org/lacking", 66, "is not there"),
        ("org/down", 69, "status 503"),
    ],
)
def test_refusal_of_headers(headers: Asked, model: str, exit_code: int, words: str) -> None:
    assert words in headers.answers[model]["error"]
    assert headers.answers[model]["exit_code"] == exit_code


def test_without_the_network_the_cache_serves(hub: Hub, full: Asked, headers: Asked) -> None:
    begin = len(hub.requests)
    models = ("org/model", "org/model@v1", f"org/model@{COMMIT}", "org/nothing")
    *whole, nothing = ask(hub.url, full.home, *models, offline=True)
    for answer in whole:
        assert answer["tensors"] == sorted(tiny_tensors())
        assert len(answer["said"]) == 3
        assert all(f"commit {COMMIT} of its cache is read" in line for line in answer["said"])
    assert nothing["exit_code"] == 69
    (partial,) = ask(hub.url, headers.home, "org/model", offline=True)
    assert partial["exit_code"] == 69, "what is missing is the network, not a file that the user could find"
    assert len(hub.requests) == begin


def test_hub_that_cannot_be_reached(full: Asked, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    (cached,) = ask(nowhere, full.home, "org/model")
    assert cached["tensors"] == sorted(tiny_tensors())
    (note,) = cached["said"]
    assert note.startswith("note: the hub cannot be reached for org/model (")
    assert note.endswith(f"; commit {COMMIT} of its cache is read")
    (unknown,) = ask(nowhere, tmp_path, "org/model")
    assert unknown["exit_code"] == 69
    assert "cannot be reached" in unknown["error"]
