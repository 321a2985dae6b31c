"""The baseline: how much of the gap a plain LoRA closes on the lab's pairs when it is trained by distillation.

For every pair and budget of tokens a zero-start PEFT LoRA is trained with several learning rates, the best is chosen on
calibration text that is not trained on, and that one alone is measured on held-out text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs by its path as well

from benchmarks._lora import GRID, Search, Training, check_saved, search
from benchmarks._measure import machine, one_thread, print_machine
from moe_svd_distill.algebra.figures import Measurement, cross_entropy_gap_closed, kl_gap_closed
from moe_svd_distill.calibration.documents import Document, in_drawn_order
from moe_svd_distill.calibration.reading import read_text
from moe_svd_distill.calibration.text import TokenizedText, tokenize
from moe_svd_distill.calibration.tokenizer import load_tokenizer
from moe_svd_distill.calibration.vocabulary import require_shared_vocabulary
from moe_svd_distill.evaluation.from_states import TeacherRecord
from moe_svd_distill.evaluation.loading import load_model
from moe_svd_distill.evaluation.sources import measure, record_teacher
from moe_svd_distill.evaluation.uncertainty import Bootstrap
from moe_svd_distill.files.typed import as_json
from moe_svd_distill.pipeline.lab import LabPair, lab_pair

PAIRS = ("pruned", "independent", "sibling", "dense", "moe-to-dense", "dense-to-moe")
BUDGETS = (65_536, 32_768, 8_192)
LENGTH = 256
TUNING_TOKENS = 16_384


def main() -> None:
    """Train, measure, and print one line for each run."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--pair", action="append", choices=PAIRS, help="once or more")
    options.add_argument("--tokens", action="append", type=int, help=f"once or more; by default {BUDGETS}")
    options.add_argument("--all", action="store_true", help="every pair")
    options.add_argument("--seeds", type=int, default=1, help="runs of each, with seeds that follow each other")
    options.add_argument("--first-seed", type=int, default=0)
    options.add_argument("--rank", type=int, default=Training.rank)
    options.add_argument("--head-rank", type=int, default=Training.head_rank, help="0: as the others")
    options.add_argument("--step-tokens", type=int, default=Training.step_tokens)
    options.add_argument("--epochs", type=int, default=Training.epochs, help="passes over the tokens")
    options.add_argument("--learning-rates", nargs="+", type=float, default=list(GRID))
    options.add_argument("--device", default="cpu")
    options.add_argument("--save", type=Path, help="folder for the adapters")
    options.add_argument("--json", type=Path, help="append every result to this file at once, a line of JSON each")
    asked = options.parse_args()
    if not asked.all and not asked.pair:
        options.error("name a --pair, or ask for --all")
    one_thread()
    print_machine()
    bench = Bench(device=asked.device)
    rows = []
    for name in PAIRS if asked.all else asked.pair:
        for tokens in asked.tokens or BUDGETS:
            for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
                training = Training(asked.rank, asked.head_rank, asked.step_tokens, asked.epochs, seed=seed)
                rows.append(bench.run(name, tokens, training, asked.learning_rates, asked.save))
                print(line(rows[-1]), flush=True)
                if asked.json:
                    with asked.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**rows[-1], "machine": machine()}) + "\n")
    print("\n" + table(rows))


@dataclass(frozen=True)
class Texts:
    """Documents for three purposes, none of which serves two."""

    training: tuple[Document, ...]
    tuning: tuple[Document, ...]
    heldout: tuple[Document, ...]


@dataclass
class Bench:
    """Runs of one process; each teacher reads each text once."""

    device: str = "cpu"
    records: dict[tuple[Path, Path, str, int | None], tuple[TeacherRecord, float]] = field(default_factory=dict)
    students: dict[tuple[Path, Path], Measurement] = field(default_factory=dict)

    def run(
        self, name: str, tokens: int, training: Training, grid: Sequence[float] = GRID, save: Path | None = None
    ) -> dict[str, Any]:
        """Train and measure an adapter; plain values for JSON."""
        pair = any_pair(name)
        teacher, teacher_seconds = self.record(pair, "training", tokens)
        tuning, _ = self.record(pair, "tuning", TUNING_TOKENS)
        found = search(pair.student, teacher, tuning, training, grid)
        with tempfile.TemporaryDirectory() as scratch:
            folder = save / f"{name}-{tokens}-seed{training.seed}" if save else Path(scratch)
            reload_error = check_saved(found.best, pair.student, tuning, folder)
        heldout, _ = self.record(pair, "heldout", None)
        before = self.student(pair, heldout)
        after = measure(found.best.peft_model.get_base_model(), heldout)
        return {
            "pair": name,
            "teacher": pair.teacher.name,
            "student": pair.student.name,
            "tokens": teacher.text.tokens,
            "tuning_tokens": tuning.text.tokens,
            "training": as_json(training),
            **_search_values(found),
            "teacher_seconds": round(teacher_seconds, 2),
            "reload_kl_difference": reload_error,
            **outcome(before, after, heldout.measurement),
        }

    def record(self, pair: LabPair, purpose: str, tokens: int | None) -> tuple[TeacherRecord, float]:
        """What the teacher says to a text, and the seconds it took."""
        key = (pair.teacher, pair.student, purpose, tokens)
        if key not in self.records:
            text = tokenized(pair, purpose, tokens)
            start = time.perf_counter()
            record = record_teacher(load_model(pair.teacher, self.device, _float32()), text)
            self.records[key] = record, time.perf_counter() - start
        return self.records[key]

    def student(self, pair: LabPair, heldout: TeacherRecord) -> Measurement:
        """The student as it is, on held-out text."""
        key = (pair.teacher, pair.student)
        if key not in self.students:
            self.students[key] = measure(load_model(pair.student, self.device, _float32()), heldout)
        return self.students[key]


def any_pair(name: str) -> LabPair:
    """A pair of the lab, or one across its architectures."""
    crossed = {"moe-to-dense": ("independent", "dense"), "dense-to-moe": ("dense", "independent")}
    if name not in crossed:
        return lab_pair(name)
    teachers, students = (lab_pair(part) for part in crossed[name])
    return replace(students, name=name, teacher=teachers.teacher, description=f"{name}: no common architecture")


def texts(pair: LabPair) -> Texts:
    """Four fifths of the calibration documents to train on, the others to tune on, and the held-out ones."""
    documents = in_drawn_order(read_text([pair.calibration]).documents)
    characters = list(accumulate(len(document.text) for document in documents))
    count = bisect_left(characters, 0.8 * characters[-1]) + 1
    return Texts(documents[:count], documents[count:], read_text([pair.heldout]).documents)


def tokenized(pair: LabPair, purpose: str, tokens: int | None) -> TokenizedText:
    """Sequences of 256 tokens for one purpose; all there are without a limit."""
    require_shared_vocabulary(pair.teacher, pair.student)
    return tokenize(getattr(texts(pair), purpose), load_tokenizer(pair.student), tokens, length=LENGTH)


def outcome(before: Measurement, after: Measurement, teacher: Measurement) -> dict[str, Any]:
    """Figures before and after, and the share of both gaps that is closed, in percent with 95 % intervals."""
    old, new, best = before.figures, after.figures, teacher.figures
    kl_interval, cross_entropy_interval = Bootstrap(len(before.tokens)).gaps(before, after, teacher)
    return {
        "gap_closed": {
            "kl": kl_gap_closed(old.kl, new.kl),
            "kl_interval": kl_interval and asdict(kl_interval),
            "cross_entropy": cross_entropy_gap_closed(old.cross_entropy, new.cross_entropy, best.cross_entropy),
            "cross_entropy_interval": cross_entropy_interval and asdict(cross_entropy_interval),
        },
        "heldout": {"teacher": as_json(best), "student": as_json(old), "adapted": as_json(new)},
    }


def line(row: dict[str, Any]) -> str:
    """One run in one line of a table."""
    gap, heldout = row["gap_closed"], row["heldout"]
    return (
        f"{row['pair']:<13}{row['tokens']:>7}{row['training']['seed']:>5}  "
        f"{_percent(gap['kl'], gap['kl_interval'])}  "
        f"{_percent(gap['cross_entropy'], gap['cross_entropy_interval'])}  "
        f"{heldout['student']['kl']:.4f} -> {heldout['adapted']['kl']:.4f}  "
        f"{row['learning_rate']:<8.0e}{'edge' if row['learning_rate_at_edge'] else '':<5}"
        f"{row['steps']:>5}{row['training_seconds']:>8.1f}{row['search_seconds']:>9.1f}"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All runs under a heading."""
    heading = (
        f"{'pair':<13}{'tokens':>7}{'seed':>5}  {'KL gap closed, %':<24}  {'CE gap closed, %':<24}  "
        f"{'held-out KL':<16}  {'rate':<13}{'steps':>5}{'train s':>8}{'search s':>9}"
    )
    return "\n".join([heading, *map(line, rows)])


def _search_values(found: Search) -> dict[str, Any]:
    finite = {f"{rate:g}": kl if kl < float("inf") else None for rate, kl in found.tuning_kl.items()}
    return {
        "learning_rate": found.best.learning_rate,
        "learning_rate_at_edge": found.at_edge,
        "tuning_kl": finite,
        "steps": found.best.steps,
        "first_loss": found.best.losses[0],
        "last_loss": found.best.losses[-1],
        "training_seconds": round(found.best.seconds, 2),
        "search_seconds": round(found.seconds, 2),
    }


def _percent(value: float | None, interval: dict[str, float] | None) -> str:
    shown = "no gap" if value is None else f"{value:+6.1f}"
    return f"{shown} {'' if interval is None else '[{low:+.1f}, {high:+.1f}]'.format(**interval):<17}"


def _float32() -> Any:
    import torch

    return torch.float32


if __name__ == "__main__":
    main()
