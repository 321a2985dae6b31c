"""A whole run against the described first-generation method on the same pair, CPU seconds side by side.

Both run as processes of their own at one thread and are charged everything, imports and children included. This project
runs k-means with 10 restarts; the first generation is run with 10 as well, and with 1.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks._measure import machine, print_machine
from benchmarks.synthetic import STUDENT, TEACHER, write_model

RANK = 64
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Write the pair, run both, print the table; ``--json FILE`` keeps the figures."""
    words = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher = write_model(folder / "teacher", TEACHER, 1)
        student = write_model(folder / "student", STUDENT, 2)
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        print_machine()
        print(f"pair of {size / 1e9:.2f} GB, rank {RANK}, one worker, one thread", flush=True)
        ours = {}
        for projection in ("svd", "slice"):
            ours[projection] = _cpu_seconds(_distill(teacher, student, folder / projection, projection))
            print(f"this project, {projection:<6}           {ours[projection]:8.1f} s CPU", flush=True)
        baseline = {}
        for restarts in (1, 10):
            words = [str(teacher), str(student), str(restarts)]
            baseline[restarts] = _cpu_seconds([sys.executable, "-c", _BASELINE, *words])
            ratios = ", ".join(f"{name} {baseline[restarts] / seconds:.1f}x" for name, seconds in ours.items())
            print(
                f"first generation, exact SVDs, {restarts} restarts   {baseline[restarts]:8.1f} s CPU: {ratios}",
                flush=True,
            )
    figures: dict[str, object] = {
        "baseline_cpu_s": baseline,
        "ours_cpu_s": ours,
        "bytes": size,
        **{"machine": machine()},
    }
    if "--json" in words:
        Path(words[words.index("--json") + 1]).write_text(json.dumps(figures, indent=2))
    return figures


_BASELINE = f"""
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from benchmarks.first_generation import run
print(run(Path(sys.argv[1]), Path(sys.argv[2]), {RANK}, int(sys.argv[3])), "tensors")
"""


def _distill(teacher: Path, student: Path, output: Path, projection: str) -> list[str]:
    command = [sys.executable, "-m", "moe_svd_distill", "distill", "--teacher", str(teacher), "--student", str(student)]
    return [
        *command,
        "--output",
        str(output),
        "--rank",
        str(RANK),
        "--workers",
        "1",
        "--projection",
        projection,
        "--json",
    ]


def _cpu_seconds(command: list[str]) -> float:
    """CPU seconds of a command and all its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, env={**os.environ, **ONE_THREAD}, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


if __name__ == "__main__":
    main()
