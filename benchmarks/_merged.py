"""An adapter as PEFT applies it, beside the same adapter merged into the student."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from moe_svd_distill.adapter.merge import merge
from moe_svd_distill.adapter.verify import verify
from moe_svd_distill.calibration.reading import read_text
from moe_svd_distill.calibration.text import tokenize
from moe_svd_distill.calibration.tokenizer import load_tokenizer
from moe_svd_distill.evaluation.loading import AdaptedStudent, load_model
from moe_svd_distill.evaluation.sources import measure, record_teacher

TOKENS = 16_384


def merged_beside_unmerged(adapter: Path, teacher: Path, student: Path, text: Path) -> dict[str, dict[str, float]]:
    """Verify an adapter, merge it, and measure KL and cross-entropy both ways, in nats per token, all in float32."""
    verify(adapter)
    tokenized = tokenize(read_text([text]).documents, load_tokenizer(student), TOKENS, length=512)
    record = record_teacher(load_model(teacher, "cpu", torch.float32), tokenized)
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "merged"
        merge(adapter, student, merged)
        models = {
            "unmerged": AdaptedStudent.load(load_model(student, "cpu", torch.float32), adapter).model,
            "merged": load_model(merged, "cpu", torch.float32),
        }
        found = {name: measure(model, record).figures for name, model in models.items()}
    return {name: {"kl": each.kl, "cross_entropy": each.cross_entropy} for name, each in found.items()}
