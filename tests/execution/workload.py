"""Units and work for the tests of the supervisor: importable by a fresh process, and needing torch alone."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.parts import PartContent
from moe_svd_distill.execution.worker import report_progress


@dataclass(frozen=True)
class ToyUnit:
    """A layer of a model that does not exist."""

    index: int
    salt: str = ""

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.salt}{self.index}".encode()).hexdigest()

    @property
    def label(self) -> str:
        return f"layer {self.index}"

    @property
    def weight(self) -> float:
        return float(self.index % 3 + 1)


def toy_units(count: int, salt: str = "") -> list[ToyUnit]:
    return [ToyUnit(index, salt) for index in range(count)]


@dataclass(frozen=True)
class ToyWork:
    """Random factors from the unit's key. ``journal`` gets a line per unit begun; ``trouble`` befalls ``victim``.

    Args:
        journal: Where to note that a unit was begun.
        seconds: How long a unit takes.
        victim: The label of the unit that gets into trouble.
        trouble: What happens to it.
        times: How often; counted by files beside the journal, since processes come and go.
        rows: The size of the tensors.
    """

    journal: Path
    seconds: float = 0.0
    victim: str = ""
    trouble: str = ""
    times: int = 1
    rows: int = 64

    def __call__(self, unit: ToyUnit, device: str) -> PartContent:
        with self.journal.open("a") as file:
            file.write(f"{unit.label}\t{os.getpid()}\t{device}\n")
        if unit.label == self.victim and self._take_turn():
            self._suffer(device)
        for step in range(4):
            time.sleep(self.seconds / 4)
            report_progress(step / 4)
        generator = torch.Generator().manual_seed(int(unit.key[:15], 16))
        matrix = torch.randn(self.rows, self.rows, generator=generator)
        left, values, right = torch.linalg.svd(matrix @ matrix)
        tensors = {
            f"layers.{unit.index}.lora_A": right[:8].clone(),
            f"layers.{unit.index}.lora_B": (left[:, :8] * values[:8]).to(torch.bfloat16),
        }
        return PartContent(tensors, {"fates": {"layers.q": "projected"}, "threads": torch.get_num_threads()})

    def _take_turn(self) -> bool:
        for turn in range(self.times):
            try:
                self.journal.with_name(f"turn-{turn}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False

    def _suffer(self, device: str) -> None:
        match self.trouble:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "nan":
                raise BadDataError("Tensor layers.1.q has 3 NaN values, expected none", "Use --nan skip or zero")
            case "raise":
                raise ValueError("singular\nmatrix")
            case "disk":
                raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
            case "memory":
                raise MemoryError
