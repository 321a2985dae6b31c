"""The pairs: which teacher goes with which student, and what was measured. Written to pairs.yaml by the training."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from lab.corpus import read_lines
from lab.measure import Figures, compare, heldout_windows, load_model
from lab.plan import LAB, PAIRS, TEXT

_HEADER = """\
# The lab's pairs. Written by lab/train.py; paths are relative to this file.
# Figures: nats per predicted token on the held-out text, models loaded in float32, windows of 256 tokens;
# kl is KL(teacher || student); gap is the student's cross-entropy minus the teacher's.
"""


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, by their model folders' names."""

    name: str
    teacher: str
    student: str
    description: str


PAIRS_OF_THE_LAB: tuple[Pair, ...] = (
    Pair(
        "independent",
        "qwen3-moe-teacher",
        "qwen3-moe-independent",
        "Qwen3-MoE; a smaller student with its own initialisation, trained by itself on the same text",
    ),
    Pair(
        "pruned",
        "qwen3-moe-teacher",
        "qwen3-moe-pruned",
        "Qwen3-MoE; a smaller student cropped from the teacher in every dimension and briefly retrained",
    ),
    Pair(
        "sibling",
        "qwen3-moe-teacher",
        "qwen3-moe-sibling",
        "Qwen3-MoE; a student of the teacher's shape and initialisation: an earlier state of the same training",
    ),
    Pair(
        "dense",
        "llama-teacher",
        "llama-student",
        "Llama; a smaller dense student with its own initialisation, trained by itself on the same text",
    ),
)


def _figures(figures: Figures) -> dict[str, float | int]:
    return {
        "teacher_cross_entropy": round(figures.teacher_cross_entropy, 4),
        "student_cross_entropy": round(figures.student_cross_entropy, 4),
        "gap": round(figures.gap, 4),
        "kl": round(figures.kl, 4),
        "top1_agreement": round(figures.top1_agreement, 4),
        "heldout_tokens": figures.tokens,
    }


def fill_figures() -> None:
    """Measure every pair whose models are published and write pairs.yaml."""
    documents = read_lines(TEXT / "heldout.jsonl")
    entries: dict[str, dict[str, object]] = {}
    for pair in PAIRS_OF_THE_LAB:
        teacher, student = LAB / "models" / pair.teacher, LAB / "models" / pair.student
        if not (teacher / "config.json").exists() or not (student / "config.json").exists():
            continue
        figures = compare(load_model(teacher), load_model(student), heldout_windows(teacher, documents))
        entries[pair.name] = {
            "description": pair.description,
            "teacher": f"models/{pair.teacher}",
            "student": f"models/{pair.student}",
            "figures": _figures(figures),
        }
        print(f"[{pair.name}] {entries[pair.name]['figures']}", flush=True)
    content = {
        "text": {
            "calibration": "text/calibration.jsonl",
            "heldout": "text/heldout.jsonl",
            "licence": "text/NOTICE",
        },
        "pairs": entries,
    }
    PAIRS.write_text(_HEADER + yaml.safe_dump(content, sort_keys=False, width=120), encoding="utf-8")
