"""Sending an adapter to the hub, which is a stand-in on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_svd_distill.errors import BadDataError, MissingInputError, UsageError
from moe_svd_distill.pipeline.push import push, without_paths
from tests.checkpoints.hub_server import Hub, Uploaded, serve
from tests.support.run_records import content, evaluation

REPO, TOKEN = "me/adapter", "hf_averysecrettoken"
WEIGHTS = b"weights" * 100


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub(writers=(TOKEN,))) as served:
        yield served


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "parts").mkdir(parents=True)
    (folder / "cache").mkdir()
    (folder / "parts" / "part-1.safetensors").write_bytes(b"x")
    (folder / "report.html").write_text("passages of my text")
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "student")}))
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    run = {key: value for key, value in content(adapter_sha256=digest).items() if key != "evaluation"}
    (folder / "run.json").write_text(json.dumps(run))
    figures = evaluation() | {"adapter_sha256": digest, "continuations": {"prompts": ["my text"]}}
    (folder / "evaluation.json").write_text(json.dumps(figures))
    return folder


def run(hub: Hub, home: Path, *words: str, token: str | None = TOKEN) -> tuple[int, str]:
    """The command in a process of its own, because the hub's library reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    environment = {key: value for key, value in os.environ.items() if "TOKEN" not in key} | settings
    environment |= {"HF_TOKEN": token} if token else {}
    words = ("-m", "moe_svd_distill", "push", *words)
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert TOKEN not in said
    assert "Traceback" not in said
    return done.returncode, said


def test_only_the_adapters_own_files_arrive_and_nothing_of_the_machine(adapter: Path, hub: Hub, tmp_path: Path) -> None:
    code, said = run(hub, tmp_path, str(adapter), REPO)
    assert code == 0, said
    made = hub.uploads[REPO]
    assert made.private
    assert made.files["adapter_model.safetensors"] == WEIGHTS
    assert made.files.keys() == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "run.json",
        "evaluation.json",
    }
    everything = b"".join(made.files.values())
    for private in (str(tmp_path).encode(), b"/home/someone", b"/somewhere/on", b"my text"):
        assert private not in everything
    assert json.loads(made.files["evaluation.json"])["verdict"] == evaluation()["verdict"]
    assert "Not sent: cache/, parts/, report.html" in said
    assert "(private)" in said


def test_what_has_arrived_is_not_sent_again(adapter: Path, hub: Hub, tmp_path: Path) -> None:
    hub.refuses_blobs = 1
    code, said = run(hub, tmp_path, str(adapter), REPO)
    assert code == 69
    assert len(said.strip().splitlines()) == 1
    assert hub.uploads[REPO].files == {}
    assert run(hub, tmp_path, str(adapter), REPO)[0] == 0
    assert run(hub, tmp_path, str(adapter), REPO)[0] == 0
    assert hub.uploads[REPO].puts == 1


@pytest.mark.parametrize("token", [None, "hf_another"])
def test_without_the_right_to_write_nothing_is_sent(token: str | None, adapter: Path, hub: Hub, tmp_path: Path) -> None:
    code, said = run(hub, tmp_path, str(adapter), REPO, token=token)
    assert code == 69
    assert len(said.strip().splitlines()) == 1
    assert "hf auth login" in said
    assert hub.uploads == {}


def test_a_repository_that_is_public_already_is_refused_unless_asked(adapter: Path, hub: Hub, tmp_path: Path) -> None:
    hub.uploads[REPO] = Uploaded(private=False)
    code, said = run(hub, tmp_path, str(adapter), REPO)
    assert code == 2
    assert "--public" in said
    assert hub.uploads[REPO].files == {}
    code, said = run(hub, tmp_path, str(adapter), REPO, "--public")
    assert code == 0
    assert "(public)" in said


def test_a_dry_run_asks_nobody(adapter: Path) -> None:
    report = push(adapter, REPO, dry_run=True)
    assert report.files["adapter_model.safetensors"] == len(WEIGHTS)
    assert report.left == ("cache/", "parts/", "report.html")
    assert report.url is None


def test_what_is_no_adapter_or_no_name_is_refused(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="holds no adapter"):
        push(tmp_path / "empty", REPO, dry_run=True)
    for name in ("adapter", "me/adapter@main", "../up", "a b/c"):
        with pytest.raises(UsageError, match="ORGANISATION/NAME"):
            push(adapter, name, dry_run=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(BadDataError, match="not the adapter of its run"):
        push(adapter, REPO, dry_run=True)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/models/teacher", "teacher"),
        ("replaces the adapter in /home/me/out, which", "replaces the adapter in out, which"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("org/name", "org/name"),
        ("a/b/c relative", "a/b/c relative"),
        ("'/tmp/x y/z'", "'x y/z'"),
    ],
)
def test_paths_of_a_machine_are_cut(text: str, left: str) -> None:
    assert without_paths({text: [text, 1, None]}) == {left: [left, 1, None]}
