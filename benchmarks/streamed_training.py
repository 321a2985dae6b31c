"""Both models larger than memory: ``python -m benchmarks.streamed_training``.

Synthetic Qwen3-MoE checkpoints with the lab's tokenizer are distilled by the command line in a memory cgroup (where the
machine lets us make one), the student streamed, and once more without a limit, the student in memory. Reported: the
curves of both, seconds and bytes a step, and what a step waits for.

On a GPU, with layers of the shapes of Qwen3-30B-A3B, and what reading and extra alone take there:

    python -m benchmarks.streamed_training --device cuda --real --step-tokens 8192 --step-tokens 32768 --steps 5
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks._limits import memory_group
from benchmarks._measure import print_machine
from benchmarks.synthetic import Sizes, write_model
from moe_svd_distill.pipeline.lab import lab_folder

MIB = 2**20
STUDENT = Sizes(180, 1024, 4, 1024, 8, 2, 64, 2048, 2)  # 27 MiB a layer
REAL = Sizes(8, 2048, 128, 768, 32, 4, 128, 2048, 8)  # 1.2 GiB a layer
LENGTHS = {STUDENT: 128, REAL: 512}  # tokens of a sequence
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    """Write the models, distil twice, print the figures.

    Raises:
        SystemExit: A run fails, or the two differ by more than rounding.
    """
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--real", action="store_true", help="layers with the shapes of Qwen3-30B-A3B")
    options.add_argument("--layers", type=int)
    options.add_argument("--teacher-layers", type=int, help="default: 8 more, with --real 2")
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--step-tokens", type=int, action="append", help="once or more; default: one sequence")
    options.add_argument("--rank", type=int, default=1)
    options.add_argument("--device", default="cpu")
    options.add_argument("--no-resident", action="store_true", help="leave out the run in memory")
    options.add_argument("--limit-mib", type=int, help="default: a quarter of the student")
    asked = options.parse_args()
    print_machine()
    kind = REAL if asked.real else STUDENT
    with tempfile.TemporaryDirectory() as scratch:
        sizes = replace(kind, layers=asked.layers or kind.layers)
        above = replace(sizes, layers=asked.teacher_layers or (2 if asked.real else sizes.layers + 8))
        student = _with_tokenizer(write_model(Path(scratch) / "student", sizes, 1, asked.device), LENGTHS[kind])
        teacher = _with_tokenizer(write_model(Path(scratch) / "teacher", above, 2, asked.device), LENGTHS[kind])
        stored = sum(path.stat().st_size for path in student.glob("*.safetensors"))
        limit_bytes = asked.limit_mib * MIB if asked.limit_mib else stored // 4
        group = memory_group(limit_bytes) if asked.device == "cpu" else None
        limited = "memory cgroup" if group else "no limit was set"
        print(f"student {stored / MIB:,.0f} MiB stored; limit {limit_bytes / MIB:,.0f} MiB ({limited})", flush=True)
        if asked.device != "cpu":
            _print_ceilings(next(student.glob("model-00002-*.safetensors")), asked.device)
        for step_tokens in asked.step_tokens or [LENGTHS[kind]]:
            run = _Run(teacher, student, Path(scratch), LENGTHS[kind], step_tokens, asked, group)
            records = {}
            for placement in ("streamed",) if asked.no_resident else ("streamed", "resident"):
                records[placement] = run.distil(placement)
                _report(placement, step_tokens, records[placement])
            if len(records) == 2:
                _compare(*records.values())


@dataclass(frozen=True)
class _Run:
    teacher: Path
    student: Path
    scratch: Path
    length: int
    step_tokens: int
    asked: argparse.Namespace
    group: Path | None

    def distil(self, placement: str) -> dict[str, Any]:
        """Distil by the command line; returns what run.json says."""
        asked, output = self.asked, self.scratch / f"{placement}-{self.step_tokens}"
        tokens = max(512, self.step_tokens * asked.steps)
        training = {"step_tokens": self.step_tokens, "learning_rate": 1e-4, "checks": 1, "placement": placement}
        training |= {"epochs": self.step_tokens * asked.steps / tokens}
        if asked.device == "cpu":
            training |= {"batch_tokens": self.length}
        recipe = {
            "teacher": str(self.teacher),
            "student": str(self.student),
            "output": str(output),
            "cache": str(self.scratch / "cache"),
            "method": "refined",
            "start": "zero",
            "calibration": [str(lab_folder() / "text" / "calibration.jsonl")],
            "tokens": tokens,
            "copies": 0,
            "own_text": 0,
            "scale_search_tokens": 512,
            "rank": asked.rank,
            "devices": [asked.device],
            "workers": 1,
            "training": training,
        }
        file = output.with_suffix(".yaml")
        file.write_text(json.dumps(recipe))
        limit = self.group if placement == "streamed" else None

        def enter() -> None:
            if limit is not None:
                (limit / "cgroup.procs").write_text(str(os.getpid()))

        command = [sys.executable, "-m", "moe_svd_distill", "distill", str(file), "--json"]
        begin = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
        if done.returncode not in (0, 79):
            raise SystemExit(f"FAILED: exit code {done.returncode}: {done.stdout[-500:]}")
        record: dict[str, Any] = json.loads((output / "run.json").read_text())
        shutil.rmtree(output)
        return record | {"wall_seconds": time.monotonic() - begin}


def _report(placement: str, step_tokens: int, record: dict[str, Any]) -> None:
    facts = record["refinement"]
    passes = {name: found["seconds"] for name, found in record["refinement"]["streamed"].items()}
    last = facts["curve"][-1]
    print(
        f"{placement}, {step_tokens:,} tokens a step: {facts['steps']} steps, "
        f"{facts['training_seconds'] / facts['steps']:.2f} s each with checks, "
        f"{last['tokens'] / facts['training_seconds']:,.0f} tokens a second, "
        f"{facts['bytes_read'] / facts['steps'] / MIB:,.0f} MiB read a step with checks; "
        f"reading {facts['seconds_reading']:.1f} s, of which waiting for it {facts['seconds_waiting']:.1f} s, "
        f"of {facts['training_seconds']:.1f} s; peak of anonymous memory "
        f"{facts['peak_anonymous_bytes'] / MIB:,.0f} MiB, on the GPU {facts['peak_device_bytes'] / MIB:,.0f} MiB; "
        f"teacher's pass {passes.get('teacher', 0.0):.1f} s; whole command {record['wall_seconds']:.0f} s; "
        f"KL {[round(point['kl'], 6) for point in facts['curve']]}",
        flush=True,
    )


def _print_ceilings(shard: Path, device: str) -> None:
    """What a layer's file takes to be read, and to be copied to the GPU from ordinary and from page-locked memory."""
    import torch

    size = shard.stat().st_size
    ordinary = torch.zeros(size, dtype=torch.uint8)
    rates = []
    for _ in range(2):
        begin = time.monotonic()
        with shard.open("rb", buffering=0) as file:
            into = memoryview(ordinary.numpy())
            while into:
                into = into[file.readinto(into) or len(into) :]
        rates.append(size / (time.monotonic() - begin))
    locked = ordinary.pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    for source in (ordinary, locked):
        for _ in range(2):
            torch.cuda.synchronize()
            begin = time.monotonic()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            seconds = time.monotonic() - begin
        rates.append(size / seconds)
    names = ("read once", "read again", "copied from ordinary memory", "from page-locked memory")
    shown = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in zip(names, rates, strict=True))
    print(f"one layer, {size / MIB:,.0f} MiB, GB/s: {shown}", flush=True)


def _compare(streamed: dict[str, Any], resident: dict[str, Any]) -> None:
    pairs = zip(streamed["refinement"]["curve"], resident["refinement"]["curve"], strict=True)
    worst = max(abs(mine["kl"] - theirs["kl"]) / theirs["kl"] for mine, theirs in pairs)
    print(f"largest relative difference of KL between both: {worst:.2e}")
    if worst > 1e-3:
        raise SystemExit("FAILED: the two runs differ by more than rounding")


def _with_tokenizer(model: Path, length: int) -> Path:
    for name in TOKENIZER:
        shutil.copyfile(lab_folder() / "models" / "qwen3-moe-teacher" / name, model / name)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": length}))
    return model


if __name__ == "__main__":
    main()
