"""What has to start without torch does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.checkpoints.builders import write_model

SCRIPT = """
import sys
from moe_svd_distill.checkpoints import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
print(len(checkpoint), len(checkpoint.fingerprint()), checkpoint.total_bytes)
heavy = {"torch", "numpy", "safetensors", "transformers", "huggingface_hub"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_headers_are_read_without_any_heavy_import(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(write_model(tmp_path, shards=2))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["6", "74"]
