"""A model several times larger than memory, run layer by layer: ``python -m benchmarks.streaming``.

A synthetic Qwen3-MoE checkpoint is streamed in a child process under a memory limit: a memory cgroup where the machine
lets us make one, else a limit on the process's data (RLIMIT_DATA, which mapped files do not count against). Reported:
the peak of anonymous memory against two layers plus activations, the bytes read, and how much of reading and computing
went on at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._limits import memory_group
from benchmarks._measure import print_machine
from benchmarks.synthetic import Sizes, write_model

MIB = 2**20
# 24 layers of 108 MiB stored, 216 MiB in float32.
SIZES = Sizes(24, 1024, 32, 544, 16, 4, 64, 8192)
LENGTH = 128
BATCH_TOKENS = 1024
BATCH_TENSORS = 24  # of a batch's size: a layer's forward, results waiting to be written, what the allocator keeps


def main() -> None:
    """Write the models, run the passes, print the figures.

    Raises:
        SystemExit: A pass fails, reads something twice, or takes more memory than two layers and activations.
    """
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=SIZES.layers)
    options.add_argument("--sequences", type=int, default=16)
    options.add_argument("--limit-mib", type=int, default=1100)
    options.add_argument("--child", nargs=3, metavar=("MODEL", "FOLDER", "SPILL"), help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.child:
        _child(Path(asked.child[0]), Path(asked.child[1]), asked.child[2] == "spill", asked.sequences)
        return
    print_machine()
    with tempfile.TemporaryDirectory() as scratch:
        sizes = replace(SIZES, layers=asked.layers)
        model = write_model(Path(scratch) / "model", sizes, seed=1)
        shard = max(path.stat().st_size for path in model.glob("*.safetensors"))
        for spill in ("memory", "spill"):
            record = _run(model, Path(scratch) / spill, spill, asked.sequences, asked.limit_mib * MIB)
            _report(record, model, shard, asked.limit_mib * MIB, spill, asked.sequences, sizes)


def _report(
    record: dict[str, Any], model: Path, shard: int, limit: int, spill: str, sequences: int, sizes: Sizes
) -> None:
    total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    states = 0 if spill == "spill" else sequences * LENGTH * sizes.hidden * 4
    activations = states + BATCH_TENSORS * BATCH_TOKENS * sizes.hidden * 4
    bound = 2 * 2 * shard + activations  # bf16 on the disk, float32 in memory
    peak = record["peak_anonymous_bytes"] - record["base"]
    both = record["seconds_reading"] + record["seconds_computing"]
    print(
        f"states in {'files' if spill == 'spill' else 'memory'}, {record['kind']} of {limit / MIB:,.0f} MiB:\n"
        f"  model {total / MIB:,.0f} MiB, {2 * total / MIB:,.0f} in float32; "
        f"read {record['bytes_read'] / MIB:,.0f} of {record['bytes_needed'] / MIB:,.0f} MiB needed\n"
        f"  peak of anonymous memory {peak / MIB:,.0f} MiB besides {record['base'] / MIB:,.0f} of libraries; "
        f"two layers {4 * shard / MIB:,.0f}, activations at most {activations / MIB:,.0f}\n"
        f"  {record['seconds']:.1f} s in all; reading {record['seconds_reading']:.1f}, computing "
        f"{record['seconds_computing']:.1f}, one after the other {both:.1f}; waiting for weights "
        f"{record['seconds_waiting']:.1f}",
        flush=True,
    )
    _demand(record["bytes_read"] == record["bytes_needed"], "some bytes were read twice, or not at all")
    _demand(peak <= bound, "the peak exceeds two layers plus activations")


def _run(model: Path, folder: Path, spill: str, sequences: int, limit: int) -> dict[str, Any]:
    group = memory_group(limit)

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    words = ["--sequences", sequences, "--child", model, folder, spill]
    command: Sequence[str] = [sys.executable, "-m", "benchmarks.streaming", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
    _demand(done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-500:]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record | {"kind": "memory cgroup" if group else "RLIMIT_DATA"}


def _child(model: Path, folder: Path, spill: bool, sequences: int) -> None:
    """The pass itself, in a process that does nothing else."""
    from moe_svd_distill.checkpoints import open_checkpoint
    from moe_svd_distill.execution.memory import MemoryWatch
    from moe_svd_distill.streaming import PassSettings, stream_states

    tiny = write_model(folder / "tiny", Sizes(1, 32, 2, 16, 2, 2, 16, 64), seed=0)
    ids = np.random.default_rng(0).integers(0, 64, (sequences, LENGTH))
    stream_states(
        open_checkpoint(tiny), ids[:1], folder, PassSettings(keep=False)
    ).close()  # what libraries take when all is loaded
    base = MemoryWatch().look()
    settings = PassSettings(batch_tokens=BATCH_TOKENS, activation_bytes=0 if spill else None)
    result = stream_states(open_checkpoint(model), ids, folder, settings)
    print(json.dumps(asdict(result.record) | {"base": base}))


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"FAILED: {what}")


if __name__ == "__main__":
    main()
