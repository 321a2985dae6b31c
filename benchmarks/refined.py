"""The refined stage on the lab's pairs: gap closed on held-out text, by the adapter as PEFT loads it.

    python benchmarks/refined.py --preset best --pair independent
    python benchmarks/refined.py --tokens 8192 --tokens 32768 --seeds 3 --set start=zero --set training.epochs=4

The figures to set beside are those of `lora_training.py`, a plain PEFT LoRA trained from zero with the same loss.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs by its path as well

from benchmarks._measure import machine
from benchmarks._merged import merged_beside_unmerged
from benchmarks.calibrated import MODELS
from moe_svd_distill.pipeline.distill import distill
from moe_svd_distill.pipeline.evaluate import evaluate
from moe_svd_distill.pipeline.lab import lab_folder
from moe_svd_distill.recipe import parse_recipe

_SHOWN = (
    "steps",
    "best",
    "ended",
    "training_seconds",
    "rate_trials",
    "trials",
    "settings",
    "placement",
    "trained_on_tokens",
    "scale",
)


def measure(pair: str, values: dict[str, Any], held_out: int, merged: bool) -> dict[str, Any]:
    """Distil one pair and evaluate the adapter on text it was not trained on, and merged as well where asked to."""
    lab = lab_folder()
    teacher, student = (str(lab / "models" / name) for name in MODELS[pair])
    folder = Path(tempfile.mkdtemp(prefix=f"refined-{pair}-"))
    calibration, heldout = (lab / "text" / f"{name}.jsonl" for name in ("calibration", "heldout"))
    given = {"teacher": teacher, "student": student, "output": folder / "out", "calibration": [str(calibration)]}
    begin = time.monotonic()
    try:
        adapter = distill(parse_recipe({**given, **values}))
        seconds = time.monotonic() - begin
        figures = evaluate(adapter.folder, [heldout], tokens=held_out).evaluation.content
        both = merged_beside_unmerged(adapter.folder, Path(teacher), Path(student), heldout) if merged else {}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record = adapter.record.content
    refinement = record.get("refinement") or {}
    return {
        "pair": pair,
        "values": values,
        "method": record["method"],
        "distil_seconds": round(seconds, 1),
        "gap_closed": figures["gap_closed"],
        "effect": figures["effect"],
        "student": {key: figures["student"][key] for key in ("kl", "cross_entropy")},
        "adapted": {key: figures["adapted"][key] for key in ("kl", "cross_entropy")},
        **both,
        "training": {key: refinement[key] for key in _SHOWN if key in refinement},
        "curve": [(point["step"], round(point["kl"], 4)) for point in refinement.get("curve", ())],
        "machine": machine(),
    }


def main() -> None:
    """Measure what was asked for, a line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pair", action="append", choices=sorted(MODELS))
    parser.add_argument("--preset", choices=("fast", "balanced", "best"))
    parser.add_argument("--tokens", action="append", type=int)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with seeds that follow each other")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=64_000)
    parser.add_argument("--merged", action="store_true", help="verify, merge, and measure merged and unmerged as well")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe key; training.KEY too"
    )
    parser.add_argument("--json", type=Path, help="append every result to this file as a line of JSON")
    arguments = parser.parse_args()
    for pair in arguments.pair or sorted(MODELS):
        for tokens in arguments.tokens or (None,):
            for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
                values = _values(arguments.set, arguments.preset, tokens, seed)
                line = json.dumps(measure(pair, values, arguments.held_out, arguments.merged))
                print(line, flush=True)
                if arguments.json:
                    with arguments.json.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")


def _values(settings: list[str], preset: str | None, tokens: int | None, seed: int) -> dict[str, Any]:
    values: dict[str, Any] = {"preset": preset, "seed": seed} if preset else {"method": "refined", "seed": seed}
    if tokens is not None:
        values["tokens"] = tokens
    for item in settings:
        key, value = item.split("=", 1)
        section, _, inner = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[inner] = value
    return values


if __name__ == "__main__":
    main()
