"""A tiny student, a text with a made-up teacher, and what is needed to train the one on the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe_svd_distill.algebra.whitening import whitening
from moe_svd_distill.checkpoints.opening import open_checkpoint
from moe_svd_distill.streaming import Decoder, Head, load_head
from moe_svd_distill.training.engine import Engine, ResidentEngine, StreamedEngine
from moe_svd_distill.training.head import TrainedHead
from moe_svd_distill.training.loop import Training
from moe_svd_distill.training.lora_parameters import LoraParameters, Pair
from moe_svd_distill.training.settings import TrainingSettings
from moe_svd_distill.training.text import TrainingText

LENGTH, VOCABULARY, TEACHER_WIDTH = 16, 96, 24
CPU = torch.device("cpu")


def made_up_text(sequences: int, seed: int, vocabulary: int = VOCABULARY) -> TrainingText:
    """Random tokens, a random teacher's states, and a few places that count."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, vocabulary, (sequences, LENGTH))
    position = np.flatnonzero(generator.random(ids.size) < 0.8)
    states = torch.from_numpy(generator.standard_normal((ids.size + 7, TEACHER_WIDTH)).astype(np.float32))
    following = np.where(generator.random(len(position)) < 0.7, generator.integers(0, vocabulary, len(position)), -1)
    return TrainingText(ids, position, position + 7, following, states)


@dataclass
class Setting:
    """A student in training."""

    decoder: Decoder
    bank: LoraParameters
    head: TrainedHead
    engine: Engine
    student: Head
    teacher: Head

    def training(self, text: TrainingText, check: TrainingText, settings: TrainingSettings) -> Training:
        """A run on it."""
        return Training(self.engine, self.head, text, check, settings)


def setting(
    model: Path,
    scratch: Path,
    *,
    streamed: bool = False,
    rank: int = 4,
    start: dict[str, Pair] | None = None,
    settings: TrainingSettings | None = None,
    budget: int | None = None,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Setting:
    """A tiny model as a student, with a random teacher's head."""
    checkpoint = open_checkpoint(model)
    decoder = Decoder(checkpoint, (device,), dtype, gradients=True)
    ranks = {matrix.name: rank for matrix in decoder.matrices}
    bank = LoraParameters(decoder.matrices.of_layer, ranks, device, start or {}, seed=3)
    if not streamed:
        decoder.enter_all()
    engine: Engine = (
        StreamedEngine(decoder, bank, scratch, budget=budget) if streamed else ResidentEngine(decoder, bank)
    )
    student = load_head(checkpoint, str(device), torch.float32, tokens=np.arange(VOCABULARY))
    weight = torch.randn(VOCABULARY, TEACHER_WIDTH, generator=torch.Generator().manual_seed(5)) / TEACHER_WIDTH**0.5
    teacher = Head(weight.to(device), None, student.transform)
    width = student.weight.shape[1]
    basis = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(6))
    asked = settings or TrainingSettings(epochs=1, step_tokens=64, batch_tokens=32, rate=1e-2, head_rate=1e-2)
    head = TrainedHead(
        student,
        teacher,
        whitening((basis.T @ basis / len(basis)).to(device)),
        asked,
    )
    return Setting(decoder, bank, head, engine, student, teacher)


def pairs_of(bank: LoraParameters) -> Iterator[tuple[str, Pair]]:
    """Every hub name and its ``(B, A)``."""
    for name in bank.names:
        yield name, bank.pair(name)


def disturb(bank: LoraParameters, size: float = 0.05) -> None:
    """Let every pair change something."""
    noise = torch.randn(len(bank.values), generator=torch.Generator().manual_seed(9))
    bank.values.add_(size * noise.to(bank.values.device))
