"""Bytes of a download, told while they arrive from a stand-in for the hub that sends slowly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.checkpoints.builders import write_model
from tests.checkpoints.hub_server import Hub, serve

MIB = 1 << 20
TOLD = """
import json
from moe_svd_distill.checkpoints import open_checkpoint
told = []
open_checkpoint("org/model", on_bytes=lambda done, total: told.append((done, total)))
print(json.dumps(told))
"""
SHOWN = """
from moe_svd_distill.cli.progress import Monitor
from moe_svd_distill.pipeline.pair import open_model
with Monitor() as monitor:
    open_model("org/model", on_download=monitor.on_count)
"""


def _served(tmp_path: Path, script: str, pause_s: float) -> tuple[subprocess.CompletedProcess[str], ...]:
    """A script run twice on a model of 40 MiB; nothing is downloaded the second time."""
    tensors = {f"model.layers.{number}.mlp.up_proj.weight": torch.zeros(10 * MIB // 4) for number in range(4)}
    hub = Hub(repositories={"org/model": write_model(tmp_path / "model", tensors=tensors, shards=2)}, pause_s=pause_s)
    with serve(hub):
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", script]
        run = {"env": environment, "capture_output": True, "text": True, "check": False}
        return tuple(subprocess.run(command, **run) for _ in range(2))  # type: ignore[call-overload]


def test_bytes_are_told_while_they_arrive(tmp_path: Path) -> None:
    first, second = _served(tmp_path, TOLD, pause_s=0.25)
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    done = [each for each, _ in told]
    assert len(done) > 3
    assert done == sorted(done)
    assert any(0 < each < 40 * MIB for each in done)  # the library writes pieces of 10 MiB
    assert done[-1] == told[-1][1] > 40 * MIB
    assert len({total for _, total in told}) == 1
    assert json.loads(second.stdout) == []


def test_off_a_terminal_a_download_is_a_line_with_bytes_and_the_time_left(tmp_path: Path) -> None:
    first, second = _served(tmp_path, SHOWN, pause_s=0.6)
    (line,) = [line for line in first.stderr.splitlines() if line.startswith("downloading")]
    assert re.fullmatch(r"downloading org/model, for \d s: \d+% \(0\.\d\d of 0\.04 GB\)(, about 10 s left)?", line)
    assert "downloading" not in second.stderr
