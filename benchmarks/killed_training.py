"""Training runs killed at random moments, and run again: ``python -m benchmarks.killed_training``.

Two processes train the student of the lab's independent pair. Each run is killed by SIGKILL to its whole process group
after a random time, as often as it says, and then run to its end; every adapter must have the sha256 of the undisturbed
one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._measure import print_machine
from moe_svd_distill.pipeline.lab import lab_pair


def main() -> None:
    """Run, kill, run again, compare.

    Raises:
        SystemExit: A run fails, or an adapter differs.
    """
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=10)
    options.add_argument("--tokens", type=int, default=16_384)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    print_machine()
    chance = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.monotonic()
        wanted = _to_the_end(_recipe(Path(scratch), "undisturbed", asked.tokens))
        seconds = time.monotonic() - begin
        print(f"undisturbed: {seconds:.1f} s, sha256 {wanted[:16]}", flush=True)
        for number in range(asked.runs):
            recipe = _recipe(Path(scratch), f"run-{number}", asked.tokens)
            after = chance.uniform(0.1, 0.95) * seconds
            killed = _killed(recipe, after)
            found = _to_the_end(recipe)
            state = "killed" if killed else "through before the kill"
            print(f"run {number}: {state} after {after:.1f} s; sha256 {found[:16]}", flush=True)
            if found != wanted:
                raise SystemExit("FAILED: the adapter differs")


def _recipe(scratch: Path, name: str, tokens: int) -> Path:
    pair = lab_pair("independent")
    values = {
        "teacher": str(pair.teacher),
        "student": str(pair.student),
        "output": str(scratch / name),
        "method": "refined",
        "start": "zero",
        "calibration": [str(pair.calibration)],
        "tokens": tokens,
        "copies": 0,
        "scale_search_tokens": 4096,
        "devices": ["cpu"],
        "workers": 2,
        "training": {"epochs": 3, "step_tokens": 1024, "checks": 6, "save_seconds": 1},
    }
    file = scratch / f"{name}.yaml"
    file.write_text(json.dumps(values))
    return file


def _command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "moe_svd_distill", "distill", str(recipe), "--json"]


def _killed(recipe: Path, after: float) -> bool:
    """Start a run and kill its process group; returns whether it was still running."""
    process = subprocess.Popen(
        _command(recipe), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def _to_the_end(recipe: Path) -> str:
    done = subprocess.run(_command(recipe), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"FAILED: exit code {done.returncode}: {done.stderr[-500:]}")
    return str(json.loads(done.stdout)["adapter_sha256"])


if __name__ == "__main__":
    main()
