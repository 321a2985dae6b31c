"""What the weights stage does on every bundled pair: gap closed on held-out text, with the scale search on and off."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._measure import machine, print_machine
from moe_svd_distill.pipeline.distill import distill
from moe_svd_distill.pipeline.evaluate import evaluate
from moe_svd_distill.pipeline.lab import lab_pair
from moe_svd_distill.recipe import parse_recipe

PAIRS = ("sibling", "independent", "pruned", "dense")


def main() -> None:
    """Distil and evaluate; print one line for each run."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--pairs", nargs="+", default=list(PAIRS))
    options.add_argument("--ranks", nargs="+", default=["16", "full"])
    options.add_argument("--tokens", type=int, default=24_000, help="held-out tokens")
    options.add_argument("--search", choices=("on", "off", "both"), default="both")
    options.add_argument("--set", nargs="*", default=[], help="recipe settings, for example projection=slice")
    options.add_argument("--json", type=Path)
    asked = options.parse_args()
    extra = dict(word.split("=", 1) for word in asked.set)
    print_machine()
    rows = []
    for name in asked.pairs:
        for rank in asked.ranks:
            for search in {"on": (True,), "off": (False,), "both": (True, False)}[asked.search]:
                rows.append(_measure(name, rank, search, asked.tokens, extra))
                print(_line(rows[-1]), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine(), "runs": rows}, indent=2))


def _measure(name: str, rank: str, search: bool, tokens: int, extra: dict[str, str]) -> dict[str, Any]:
    pair = lab_pair(name)
    with tempfile.TemporaryDirectory() as scratch:
        values = {
            "teacher": str(pair.teacher),
            "student": str(pair.student),
            "output": Path(scratch) / "out",
            "calibration": [pair.calibration],  # for the scale search
            "method": "weights",
            "rank": rank if rank == "full" else int(rank),
            "head_rank": "full" if rank == "full" else 64,
            "scale_search": search,
            "scale_search_tokens": 12_288,
            "devices": ["cpu"],
            **extra,
        }
        adapter = distill(parse_recipe(values))
        result = evaluate(adapter.folder, [pair.heldout], tokens=tokens).evaluation.content
    return {
        "pair": name,
        "rank": rank,
        "scale_search": search,
        "transferred": adapter.transferred,
        "decision": adapter.record.content["scale_search"]["decision"],
        "scales": adapter.record.content["scale_search"]["scales"],
        "evaluation": result,
    }


def _line(row: dict[str, Any]) -> str:
    evaluation = row["evaluation"]
    gap, control = evaluation["gap_closed"], evaluation["control_gap_closed"]
    return (
        f"{row['pair']:<12} rank {row['rank']:<5} search {'on ' if row['scale_search'] else 'off'} "
        f"gap closed KL {gap['kl']:+7.1f} % CE {gap['cross_entropy']:+7.1f} %   "
        f"KL {evaluation['student']['kl']:.4f} -> {evaluation['adapted']['kl']:.4f}   "
        f"random control {control['kl']:+.1f} %   {row['decision'][:60]}"
    )


if __name__ == "__main__":
    main()
