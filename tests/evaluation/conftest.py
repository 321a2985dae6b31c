"""A tiny pair where the truth is known: the teacher is the student plus an adapter that was trained on the text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_svd_distill.calibration.text import tokenize
from moe_svd_distill.calibration.tokenizer import load_tokenizer
from tests.support.language import LENGTH, Lab, documents, llama, write_tokenizer


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Train the adapter for a few steps, and merge it into a copy of the student to be the teacher."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("lab")
    texts = documents(60, seed=3)
    size = write_tokenizer(folder / "student", [document.text for document in texts])
    student = llama(size)
    student.save_pretrained(folder / "student")
    text = tokenize(texts, load_tokenizer(folder / "student"), length=LENGTH)

    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj", "lm_head"])
    model = get_peft_model(student, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = torch.from_numpy(text.sequences)
    for step in range(30):
        rows = torch.arange(step * 16, step * 16 + 16) % len(batches)
        loss = model(input_ids=batches[rows], labels=batches[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder / "good", save_embedding_layers=False)
    _write_random(model, folder / "random")
    teacher = model.merge_and_unload()
    teacher.save_pretrained(folder / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "student" / name, folder / "teacher" / name)
    return Lab(folder / "teacher", folder / "student", folder / "good", folder / "random", texts, text)


def _write_random(model: Any, folder: Path) -> None:
    """Save factors of the same norms with random directions, and leave the model as it was."""
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name in kept:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * kept[name].norm() / noise.norm()
    model.save_pretrained(folder, save_embedding_layers=False)
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]


@pytest.fixture
def rng() -> np.random.Generator:
    """Reproducible noise."""
    return np.random.default_rng(7)
