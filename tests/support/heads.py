"""Tiny models with a tokenizer, and teachers that differ from their student in the head alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moe_svd_distill.calibration.reading import read_text
from moe_svd_distill.pipeline.lab import lab_pair
from tests.support.models import saved
from tests.support.tokenizers import byte_level

TEXT = lab_pair("independent").calibration
TRAINED: dict[str, Any] = {
    "method": "refined",
    "start": "zero",
    "calibration": [str(TEXT)],
    "tokens": 2048,
    "scale_search_tokens": 2048,
    "rank": 4,
    "copies": 0,
    "training": {"epochs": 2, "step_tokens": 256, "batch_tokens": 128, "learning_rate": 0.01, "checks": 4},
}
"""A short run of the refined stage."""


def trained_tokenizer(folder: Path, size: int, part: int = 0) -> Path:
    """A byte-level tokenizer of this size from a part of the lab's text."""
    texts = [document.text[:3000] for document in read_text([str(TEXT)]).documents[part::4]]
    return byte_level(folder, texts, size)


def with_tokenizer(model: Path, tokenizer: Path) -> Path:
    """Put a tokenizer beside a model; returns the model."""
    for file in tokenizer.iterdir():
        shutil.copyfile(file, model / file.name)
    return model


def student_with_tokenizer(model_type: str, folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """A tiny student whose vocabulary is the tokenizer's."""
    size = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    return with_tokenizer(saved(model_type, folder, seed=1, dtype=torch.float32, vocab_size=size, **changes), tokenizer)


def teacher_with_other_head(student: Path, folder: Path, *, rank: int = 4, size: float = 0.3) -> Path:
    """A copy of a student with another head, which it has to itself: less sure of itself, and changed at low rank.

    A random student is sure of what is wrong; so cross-entropy falls on the way to this teacher, as it does for real
    ones, and the scale search has nothing against it.

    Args:
        student: The student's folder.
        folder: The teacher's.
        rank: Of the change.
        size: Of the change's entries, relative to the head's.
    """
    shutil.copytree(student, folder)
    tensors = load_file(student / "model.safetensors")
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    generator = torch.Generator().manual_seed(7)
    left = torch.randn(head.shape[0], rank, generator=generator)
    right = torch.randn(rank, head.shape[1], generator=generator)
    tensors["lm_head.weight"] = 0.3 * head + size * float(head.std()) / rank**0.5 * left @ right
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder
