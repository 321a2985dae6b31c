"""Runs that are killed, and runs in little memory: ``python -m benchmarks.soak [kills] [memory]``.

``kills``: the command line is killed (SIGKILL to its whole process group) at random moments and run again; the adapter
must have the same sha256 as one that was left in peace, and no finished unit may be computed twice.

``memory``: a pair several times larger than the memory allowed, inside a memory cgroup where the machine lets us make
one; the peak of anonymous memory must not grow with the number of layers.
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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks._limits import memory_group
from benchmarks._measure import print_machine
from benchmarks.synthetic import STUDENT, TEACHER, Sizes, write_model

SMALL_TEACHER = Sizes(12, 256, 16, 192, 8, 4, 32, 2048)
SMALL_STUDENT = Sizes(9, 192, 8, 128, 6, 2, 32, 2048)
MIB = 2**20


def main() -> None:
    """Run the campaigns that are asked for; both by default."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("campaigns", nargs="*", default=["kills", "memory"])
    options.add_argument("--trials", type=int, default=10)
    options.add_argument("--limit-mib", type=int, default=1536)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as scratch:
        if "kills" in asked.campaigns:
            kills(Path(scratch) / "kills", asked.trials, asked.seed)
        if "memory" in asked.campaigns:
            memory(Path(scratch) / "memory", asked.limit_mib * MIB)


def kills(folder: Path, trials: int, seed: int) -> None:
    """The campaign of kills.

    Raises:
        SystemExit: A resumed run differs, or computed a finished unit again.
    """
    teacher = write_model(folder / "teacher", SMALL_TEACHER, 1)
    student = write_model(folder / "student", SMALL_STUDENT, 2)
    peaceful = _run(_command(teacher, student, folder / "peaceful", 2))
    units = peaceful["execution"]["units_computed"]
    print(f"undisturbed: {units} units, sha256 {peaceful['adapter_sha256'][:16]}…")
    for workers in (1, 3):
        other = _run(_command(teacher, student, folder / f"workers-{workers}", workers))
        _demand(other["adapter_sha256"] == peaceful["adapter_sha256"], f"{workers} workers give other bytes")
        print(f"{workers} workers: the same sha256")
    chance = random.Random(seed)
    for trial in range(trials):
        output = folder / f"trial-{trial}"
        wanted, delay = chance.randrange(units), chance.uniform(0.0, 0.5)
        command = _command(teacher, student, output, 2)
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        while process.poll() is None and _parts(output) < wanted:
            time.sleep(0.01)
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1.5)  # orphaned workers notice within a second
        parts = _parts(output)
        again = _run(_command(teacher, student, output, 2))
        computed = again["execution"]["units_computed"]
        _demand(again["adapter_sha256"] == peaceful["adapter_sha256"], f"trial {trial} gives other bytes")
        _demand(computed == units - parts, f"trial {trial} computed {computed}, but only {units - parts} were missing")
        print(f"trial {trial}: killed with {parts:2d} parts on disk, {computed:2d} computed after, same sha256")


def memory(folder: Path, limit: int) -> None:
    """The campaign of little memory.

    Raises:
        SystemExit: A run fails, or its peak exceeds two teacher layers plus one student layer.
    """
    bases = {}
    for layers in (8, 24):
        teacher = write_model(folder / f"teacher-{layers}", replace(TEACHER, layers=layers), 1)
        student = write_model(folder / f"student-{layers}", replace(STUDENT, layers=layers * 3 // 4), 2)
        total = sum(path.stat().st_size for path in (*teacher.glob("*.safetensors"), *student.glob("*.safetensors")))
        shard = max(path.stat().st_size for path in teacher.glob("*.safetensors"))
        own = max(path.stat().st_size for path in student.glob("*.safetensors"))
        bound = 2 * shard + own
        group = memory_group(limit)
        record = _run(_command(teacher, student, folder / f"out-{layers}", 1), group)
        peak = max(record["execution"]["peak_anonymous_bytes_by_worker"].values())
        base = _idle_worker()
        bases[layers] = peak
        kind = "memory cgroup" if group else "no limit could be set (no writable memory cgroup)"
        print(
            f"{layers} teacher layers: pair of {total / MIB:,.0f} MiB under {limit / MIB:,.0f} MiB ({kind}); "
            f"worker's peak of anonymous memory {peak / MIB:,.0f} MiB, of which libraries {base / MIB:,.0f} MiB; "
            f"two teacher layers plus one student layer: {bound / MIB:,.0f} MiB"
        )
        _demand(peak - base <= bound, "the peak exceeds two teacher layers plus one student layer")
    _demand(bases[24] <= 1.1 * bases[8], "the peak grows with the number of layers")


def _command(teacher: Path, student: Path, output: Path, workers: int) -> list[str]:
    words = ["distill", "--teacher", teacher, "--student", student, "--output", output, "--rank", 16]
    return [
        sys.executable,
        "-m",
        "moe_svd_distill",
        *map(str, [*words, "--workers", workers, "--device", "cpu", "--json"]),
    ]


def _run(command: Sequence[str], group: Path | None = None) -> dict[str, Any]:
    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
    _demand(done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-500:]}")
    output = json.loads(done.stdout)["output"]
    record: dict[str, Any] = json.loads((Path(output) / "run.json").read_text())
    return record


def _parts(output: Path) -> int:
    """Finished parts in an output folder."""
    return len(list((output / "parts").glob("part-*.safetensors")))


def _idle_worker() -> int:
    """Anonymous memory of a process that has only imported what a worker imports."""
    code = (
        "import torch, scipy.optimize, sklearn.cluster, moe_svd_distill.transfer.unit;"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('RssAnon')][0])"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"FAILED: {what}")


if __name__ == "__main__":
    main()
