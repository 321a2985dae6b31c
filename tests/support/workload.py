"""Units and work for these tests: importable by a fresh process. Torch is imported only where it is used."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.parts import PartContent, Parts
from moe_svd_distill.execution.planned import Planned, write_tensors
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
    def cost(self) -> float:
        return float(self.index % 3 + 1)


def toy_units(count: int, salt: str = "") -> list[ToyUnit]:
    return [ToyUnit(index, salt) for index in range(count)]


@dataclass(frozen=True)
class ToyWork:
    """Random factors from the unit's key.

    Args:
        journal: Gets a line per unit begun.
        seconds: How long a unit takes.
        troubles: Label to what befalls that unit.
        times: How often it does; counted by files beside the journal, since processes come and go.
    """

    journal: Path
    seconds: float = 0.0
    troubles: Mapping[str, str] = field(default_factory=dict)
    times: int = 1

    def __call__(self, unit: ToyUnit, device: str) -> PartContent:
        import torch

        with self.journal.open("a") as file:
            file.write(f"{unit.label}\t{os.getpid()}\t{device}\n")
        trouble = self.troubles.get(unit.label)
        if trouble and self._take_turn(unit):
            suffer(trouble, device)
        for step in range(4):
            time.sleep(self.seconds / 4)
            report_progress(step / 4)
        generator = torch.Generator().manual_seed(int(unit.key[:15], 16))
        matrix = torch.randn(64, 64, generator=generator)
        left, values, right = torch.linalg.svd(matrix @ matrix)
        tensors = {
            f"layers.{unit.index}.lora_A": right[:8].clone(),
            f"layers.{unit.index}.lora_B": (left[:, :8] * values[:8]).to(torch.bfloat16),
        }
        return tensors, {"fates": {"layers.q": "projected"}, "threads": torch.get_num_threads()}

    def _take_turn(self, unit: ToyUnit) -> bool:
        for turn in range(self.times):
            try:
                self.journal.with_name(f"turn-{unit.index}-{turn}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False


def suffer(trouble: str, device: str) -> None:
    """Something goes wrong, inside the process that does the work."""
    match trouble:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(3600)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(0)
        case "nan":
            raise BadDataError("Tensor layers.1.q has 3 NaN values, expected none", "Use --nan skip or zero")
        case "raise":
            raise ValueError("singular\nmatrix")
        case "disk":
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
        case "memory":
            raise MemoryError
        case "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        case "device memory":
            if device != "cpu":
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        case _:
            raise AssertionError(trouble)


@dataclass(frozen=True)
class UnloadableWork:
    """Cannot be loaded by a worker."""

    error: Exception
    parent: int = field(default_factory=os.getpid)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if os.getpid() != state["parent"]:
            raise state["error"]

    def __call__(self, unit: ToyUnit, device: str) -> PartContent:
        raise AssertionError


def consolidated(parts: Sequence[Path], output: Path) -> str:
    """All tensors of some parts in one file; returns its digest."""
    with Parts(parts) as tensors:
        planned = {
            name: Planned(tuple(tensor.shape), tensor.dtype, partial(tensors.__getitem__, name))
            for name, tensor in tensors.items()
        }
        return write_tensors(planned, output)
