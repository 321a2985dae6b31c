"""Both models larger than memory: ``python -m benchmarks.streamed_training``.

Synthetic Qwen3-MoE checkpoints with the lab's tokenizer are distilled by the command line in a memory cgroup (where the
machine lets us make one), the student streamed, and once more without a limit, the student in memory. Reported: the
curves of both, seconds and bytes a step, and what a step waits for.

On a GPU, with layers of the shapes of Qwen3-30B-A3B and the sequences of the lab's teacher:

    python -m benchmarks.streamed_training --device cuda --real --layers 8 --step-tokens 8192 --steps 20
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks._limits import memory_group
from benchmarks._measure import print_machine
from benchmarks.synthetic import Sizes, write_model
from moe_svd_distill.pipeline.lab import lab_folder

MIB = 2**20
LENGTH = 128
STUDENT = Sizes(108, 1024, 8, 512, 8, 2, 64, 2048)  # 28 MiB a layer
REAL = Sizes(8, 2048, 128, 768, 32, 4, 128, 2048)  # 1.2 GiB a layer
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
    options.add_argument("--step-tokens", type=int, default=LENGTH)
    options.add_argument("--rank", type=int, default=1)
    options.add_argument("--device", default="cpu")
    options.add_argument("--no-resident", action="store_true", help="leave out the run in memory")
    options.add_argument("--limit-mib", type=int, help="default: a quarter of the student")
    asked = options.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as scratch:
        sizes = REAL if asked.real else STUDENT
        sizes = replace(sizes, layers=asked.layers or sizes.layers)
        above = replace(sizes, layers=asked.teacher_layers or (2 if asked.real else sizes.layers + 8))
        student = _with_tokenizer(write_model(Path(scratch) / "student", sizes, seed=1))
        teacher = _with_tokenizer(write_model(Path(scratch) / "teacher", above, seed=2))
        stored = sum(path.stat().st_size for path in student.glob("*.safetensors"))
        limit_bytes = asked.limit_mib * MIB if asked.limit_mib else stored // 4
        group = memory_group(limit_bytes) if asked.device == "cpu" else None
        kind = "memory cgroup" if group else "no limit could be set"
        print(f"student {stored / MIB:,.0f} MiB stored; limit {limit_bytes / MIB:,.0f} MiB ({kind})", flush=True)
        records = {}
        for placement in ("streamed",) if asked.no_resident else ("streamed", "resident"):
            limit = group if placement == "streamed" else None
            records[placement] = _distil(teacher, student, Path(scratch) / placement, placement, asked, limit)
            _report(placement, records[placement])
        if len(records) == 2:
            _compare(*records.values())


def _distil(
    teacher: Path, student: Path, output: Path, placement: str, asked: argparse.Namespace, group: Path | None
) -> dict[str, Any]:
    tokens = max(512, asked.step_tokens * asked.steps)
    training = {"step_tokens": asked.step_tokens, "learning_rate": 1e-4, "checks": 1, "placement": placement}
    training |= {"epochs": asked.step_tokens * asked.steps / tokens}
    if asked.device == "cpu":
        training |= {"batch_tokens": LENGTH}
    recipe = {
        "teacher": str(teacher),
        "student": str(student),
        "output": str(output),
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

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, "-m", "moe_svd_distill", "distill", str(file), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
    if done.returncode not in (0, 79):
        raise SystemExit(f"FAILED: exit code {done.returncode}: {done.stdout[-500:]}")
    record: dict[str, Any] = json.loads((output / "run.json").read_text())
    return record


def _report(placement: str, record: dict[str, Any]) -> None:
    facts = record["refinement"]
    passes = {name: found["seconds"] for name, found in record["refinement"]["streamed"].items()}
    seen = facts["curve"][-1]["tokens"]
    print(
        f"{placement}: {facts['steps']} steps, {facts['training_seconds'] / facts['steps']:.1f} s each with checks, "
        f"{seen / facts['training_seconds']:,.0f} tokens a second, "
        f"{facts['bytes_read'] / facts['steps'] / MIB:,.0f} MiB read a step with checks, waiting for weights "
        f"{facts['seconds_waiting']:.1f} s; peak of anonymous memory {facts['peak_anonymous_bytes'] / MIB:,.0f} MiB, "
        f"on the GPU {facts['peak_device_bytes'] / MIB:,.0f} MiB; "
        f"teacher's pass {passes.get('teacher', 0.0):.1f} s; KL {[round(point['kl'], 6) for point in facts['curve']]}",
        flush=True,
    )


def _compare(streamed: dict[str, Any], resident: dict[str, Any]) -> None:
    pairs = zip(streamed["refinement"]["curve"], resident["refinement"]["curve"], strict=True)
    worst = max(abs(mine["kl"] - theirs["kl"]) / theirs["kl"] for mine, theirs in pairs)
    print(f"largest relative difference of KL between both: {worst:.2e}")
    if worst > 1e-3:
        raise SystemExit("FAILED: the two runs differ by more than rounding")


def _with_tokenizer(model: Path) -> Path:
    for name in TOKENIZER:
        shutil.copyfile(lab_folder() / "models" / "qwen3-moe-teacher" / name, model / name)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LENGTH}))
    return model


if __name__ == "__main__":
    main()
