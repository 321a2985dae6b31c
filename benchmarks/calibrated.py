"""The calibrated stage on the lab's pairs: gap closed on held-out text, by the adapter as PEFT loads it.

    python benchmarks/calibrated.py --pair independent --tokens 65536 --json results.jsonl
    python benchmarks/calibrated.py --all

Pairs are those of lab/pairs.yaml and two across architectures; the figures to set beside are those of
`lora_training.py` (a plain PEFT LoRA trained from zero on as much text).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from moe_svd_distill.pipeline.distill import distill
from moe_svd_distill.pipeline.evaluate import evaluate
from moe_svd_distill.pipeline.lab import lab_folder
from moe_svd_distill.recipe import parse_recipe

MODELS = {
    "independent": ("qwen3-moe-teacher", "qwen3-moe-independent"),
    "pruned": ("qwen3-moe-teacher", "qwen3-moe-pruned"),
    "sibling": ("qwen3-moe-teacher", "qwen3-moe-sibling"),
    "dense": ("llama-teacher", "llama-student"),
    "moe-to-dense": ("qwen3-moe-teacher", "llama-student"),
    "dense-to-moe": ("llama-teacher", "qwen3-moe-independent"),
}
BUDGETS = (8192, 32768, 65536)


def measure(
    pair: str, tokens: int, held_out: int, settings: dict[str, Any], domains: tuple[str, str] | None
) -> dict[str, Any]:
    """Distil one pair and evaluate the adapter on text it was not fitted on, perhaps of another domain."""
    lab = lab_folder()
    teacher, student = (str(lab / "models" / name) for name in MODELS[pair])
    folder = Path(tempfile.mkdtemp(prefix=f"calibrated-{pair}-"))
    calibration, heldout = (lab / "text" / f"{name}.jsonl" for name in ("calibration", "heldout"))
    if domains:
        calibration, heldout = (
            _only(text, domain, folder) for text, domain in zip((calibration, heldout), domains, strict=True)
        )
    values = {
        "teacher": teacher,
        "student": student,
        "output": folder / "out",
        "calibration": [str(calibration)],
        "tokens": tokens,
        **settings,
    }
    begin = time.monotonic()
    try:
        adapter = distill(parse_recipe(values))
        seconds = time.monotonic() - begin
        found = evaluate(adapter.folder, [heldout], tokens=held_out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record, figures = adapter.record.content, found.evaluation.content
    return {
        "pair": pair,
        "tokens": tokens,
        "domains": domains,
        "domain": figures.get("domain"),
        "settings": {key: str(value) for key, value in settings.items()},
        "method": record["method"],
        "rank": record["calibration"].get("rank"),
        "copies": record["calibration"].get("copies_of_the_text"),
        "own_text": record["calibration"].get("own_text_sequences"),
        "gap_closed": figures["gap_closed"],
        "effect": figures["effect"],
        "student": {key: figures["student"][key] for key in ("kl", "cross_entropy")},
        "adapted": {key: figures["adapted"][key] for key in ("kl", "cross_entropy")},
        "distil_seconds": round(seconds, 1),
        "steps_seconds": {
            name: round(step["seconds"], 1) for name, step in record["calibration"].get("streamed", {}).items()
        },
    }


def _only(text: Path, domain: str, folder: Path) -> Path:
    """The documents of one domain of the lab's text."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = folder / f"{domain}-{text.name}"
    chosen.write_text("".join(line for line in lines if json.loads(line)["source"].startswith(domain)))
    return chosen


def main() -> None:
    """Measure what was asked for, a line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pair", action="append", choices=sorted(MODELS))
    parser.add_argument("--tokens", action="append", type=int)
    parser.add_argument("--all", action="store_true", help="all pairs at 8k, 32k and 65k tokens")
    parser.add_argument("--held-out", type=int, default=64_000)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe key")
    parser.add_argument("--domains", nargs=2, metavar=("FITTED", "HELD_OUT"), help="stdlib or documentation")
    parser.add_argument("--json", type=Path, help="append every result to this file as a line of JSON")
    arguments = parser.parse_args()
    settings = dict(item.split("=", 1) for item in arguments.set)
    for pair in arguments.pair or sorted(MODELS):
        for tokens in arguments.tokens or (BUDGETS if arguments.all else BUDGETS[-1:]):
            result = measure(pair, tokens, arguments.held_out, settings, arguments.domains)
            line = json.dumps(result)
            print(line, flush=True)
            if arguments.json:
                with arguments.json.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
