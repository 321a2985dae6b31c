"""Models read by range from a stand-in for the hub and from an object store, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.builders import CONFIG, write_model
from tests.checkpoints.hub_server import COMMIT, Hub, serve

SCRIPT = """
import json, sys
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import DistillError
for model, names, keep in json.load(sys.stdin):
    try:
        with open_checkpoint(model, remote_bytes=keep) as found:
            sums = {name: float(found.read(name).double().sum()) for name in (found if names is None else names)}
            again = open_checkpoint(found.folder)
            answer = {"sums": sums, "commit": found.commit, "folder": str(found.folder), "key": found.cache_key(),
                      "same": again.cache_key() == found.cache_key(),
                      "print": found.fingerprint() if names is None else "",
                      "source": found.source}
    except DistillError as error:
        answer = {"error": str(error), "exit_code": error.exit_code}
    print(json.dumps(answer), flush=True)
"""
SECRET = "hf_averysecrettoken"
TENSORS = {f"model.layers.{n}.mlp.up_proj.weight": torch.arange(6400.0).view(80, 80) + n for n in range(6)}


Question = tuple[str, list[str] | None, int | None]
"""A model, the tensors to read of it, and the bytes to keep."""


def _read(url: str, home: Path, model: str, names: list[str] | None = None, keep: int | None = None) -> dict[str, Any]:
    return _ask(url, home, (model, names, keep))[0]


def _ask(url: str, home: Path, *questions: Question) -> list[dict[str, Any]]:
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_TOKEN": SECRET,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(questions),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert not [path for path in home.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    said = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    return [{**json.loads(line), "said": said} for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    model = write_model(root / "model", tensors=TENSORS, shards=2)
    (model / "tokenizer.json").write_text("{}")
    names = ("model", "busy", "cut", "refusing", "norange", "bounded", "gone")
    served = Hub(
        repositories={f"org/{name}": model for name in names},
        failures={"org/private": (401, "RepoNotFound"), "org/refusing": (403, "")},
        ignores_ranges={"org/norange"},
    )
    with serve(served):
        yield served


def _sums(names: list[str] | None = None) -> dict[str, float]:
    return {name: float(TENSORS[name].double().sum()) for name in names or TENSORS}


def test_only_what_is_read_is_fetched_and_once(hub: Hub, tmp_path: Path) -> None:
    first, second = list(TENSORS)[:2], list(TENSORS)[:4]
    begin = hub.sent.get("org/model", 0)
    found = _read(hub.url, tmp_path, "hf://org/model", first)
    assert found["sums"] == _sums(first)
    assert (found["commit"], found["source"], found["same"]) == (COMMIT, "org/model", True)
    headers = sum(path.stat().st_size for path in (Path(found["folder"]) / "headers").iterdir())
    assert not list(Path(found["folder"]).glob("*.safetensors"))
    assert hub.sent["org/model"] - begin == headers + 2 * 25_600
    between = hub.sent["org/model"]
    again = _read(hub.url, tmp_path, "hf://org/model", second)
    assert again["sums"] == _sums(second)
    assert hub.sent["org/model"] - between == 2 * 25_600
    assert again["key"] == found["key"]


def test_the_same_weights_on_the_disk_have_the_same_fingerprint(hub: Hub, tmp_path: Path) -> None:
    folder = str(hub.repositories["org/model"])
    remote, local = _ask(hub.url, tmp_path, (f"hf://org/model@{COMMIT}", None, None), (folder, None, None))
    assert remote["sums"] == local["sums"] == _sums()
    assert remote["print"] == local["print"]


def test_a_busy_hub_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.hiccups["org/busy"] = ["429", "503", "cut", "cut", "503"]
    assert _read(hub.url, tmp_path, "hf://org/busy")["sums"] == _sums()
    assert hub.hiccups["org/busy"] == []


def test_no_more_is_kept_than_is_allowed(hub: Hub, tmp_path: Path) -> None:
    found, refused = _ask(hub.url, tmp_path, ("hf://org/bounded", None, 60_000), ("hf://org/bounded", None, 20_000))
    assert found["sums"] == _sums()
    kept = [path.stat().st_size for path in (Path(found["folder"]) / "tensors").rglob("*") if path.is_file()]
    assert 0 < sum(kept) <= 60_000
    assert refused["exit_code"] == 2
    assert "remote_cache_gb" in refused["error"]


REFUSALS = {
    "hf://org/norange": (69, "does not send a part"),
    "hf://org/private": (66, "log in with"),
    "hf://org/refusing": (69, "refuses"),
    "hf://org/nothing": (66, "neither a folder here nor a model"),
    "hf://nothing": (66, "organisation/name@revision"),
    "nosuch://bucket/model": (2, "cannot be read"),
    "file:///somewhere": (2, "without the scheme"),
    "memory://bucket/nothing": (66, "there is no file"),
    "s3://bucket/model": (66, "extra 'stores'"),
}


def test_refusals(hub: Hub, tmp_path: Path) -> None:
    wanted = {model: it for model, it in REFUSALS.items() if not model.startswith("s3") or find_spec("s3fs") is None}
    for model, found in zip(wanted, _ask(hub.url, tmp_path, *((model, None, None) for model in wanted)), strict=True):
        exit_code, words = wanted[model]
        assert found["exit_code"] == exit_code, (model, found)
        assert words in found["error"], (model, found)


def test_without_the_hub_what_was_fetched_serves(hub: Hub, tmp_path: Path) -> None:
    names = list(TENSORS)[:2]
    assert not _read(hub.url, tmp_path, "hf://org/gone", names)["said"]
    found = _read("http://127.0.0.1:9", tmp_path, "hf://org/gone", names)
    assert found["sums"] == _sums(names)
    (note,) = found["said"]
    assert note.startswith("note: the hub cannot be reached for org/gone (")
    assert f"commit {COMMIT} of its cache is read" in note


def test_a_quantised_model_is_read_by_range(hub: Hub, tmp_path: Path) -> None:
    folder = hub.repositories["org/model"].parent / "fp8"
    folder.mkdir()
    weight, scale = torch.randn(256, 128).to(torch.float8_e4m3fn), torch.rand(2, 1)
    save_file({"a.weight": weight, "a.weight_scale_inv": scale}, folder / "model.safetensors")
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": method}))
    hub.repositories["org/fp8"] = folder
    remote, local = _ask(hub.url, tmp_path, ("hf://org/fp8", None, None), (str(folder), None, None))
    assert list(remote["sums"]) == ["a.weight"]
    assert remote["sums"] == local["sums"]


STORE = """
import json, sys
from pathlib import Path
import fsspec
from moe_svd_distill.checkpoints import open_checkpoint
folder = Path(sys.argv[1])
store = fsspec.filesystem("memory")
for path in folder.iterdir():
    store.pipe_file(f"/bucket/model/{path.name}", path.read_bytes())
with open_checkpoint("memory://bucket/model") as found:
    sums = {name: float(found.read(name).double().sum()) for name in found}
    print(json.dumps({"sums": sums, "commit": found.commit}))
"""


def test_an_object_store(hub: Hub, tmp_path: Path) -> None:
    folder = shutil.copytree(hub.repositories["org/model"], tmp_path / "model")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", STORE, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"sums": _sums(), "commit": None}
