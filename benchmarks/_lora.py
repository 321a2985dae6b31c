"""Plain PEFT LoRA trained on a teacher's distribution: the everyday method that others are compared with.

The adapter starts at zero (B = 0, A uniform as PEFT draws it), sits on every matrix of the decoder layers and on the
head, and is trained by AdamW on KL(teacher ‖ student) over the teacher's full distribution.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_svd_distill.algebra.divergence import kl_divergence
from moe_svd_distill.errors import BadDataError, IncompatiblePairError, UsageError
from moe_svd_distill.evaluation.from_states import TeacherRecord
from moe_svd_distill.evaluation.loading import AdaptedStudent, load_model
from moe_svd_distill.evaluation.sources import measure

GRID = (3e-4, 1e-3, 3e-3, 1e-2)
_GRID_LIMITS = (1e-5, 1.0)
_SAME_KL = 1e-4


@dataclass(frozen=True)
class Training:
    """How an adapter is trained.

    Attributes:
        rank: Of every pair; alpha is the same, so that B·A acts unscaled.
        head_rank: Of the head's pair; 0 for the same.
        step_tokens: Tokens of one optimiser step, at least one sequence.
        epochs: Passes over the tokens.
        warm_up: Share of the steps in which the learning rate rises linearly; a cosine takes it down afterwards.
        clip: Norm that the gradient is clipped to.
        betas: Of AdamW; there is no weight decay.
        seed: Draws A and the order of the sequences.
    """

    rank: int = 64
    head_rank: int = 0
    step_tokens: int = 1024
    epochs: int = 1
    warm_up: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class TrainedAdapter:
    """What one training run leaves.

    Attributes:
        peft_model: The student with its trained adapter.
        learning_rate: The peak.
        steps: Optimiser steps taken.
        seconds: Wall time of the steps, without loading and measuring.
        losses: KL of every step in nats per token, before the step; ends early where it is not finite.
        diverged: Whether a loss or what was trained is not finite.
    """

    peft_model: Any
    learning_rate: float
    steps: int
    seconds: float
    losses: tuple[float, ...]
    diverged: bool


@dataclass(frozen=True, eq=False)
class Search:
    """The runs over a grid of learning rates.

    Attributes:
        best: The run with the lowest KL on the tuning text.
        tuning_kl: KL on the tuning text by learning rate, ascending; infinite where training diverged.
        seconds: Wall time of all training runs together.
    """

    best: TrainedAdapter
    tuning_kl: dict[float, float]
    seconds: float

    @property
    def at_edge(self) -> bool:
        """Whether a still smaller or greater learning rate might have been better."""
        return self.best.learning_rate in (min(self.tuning_kl), max(self.tuning_kl))


def adapter_targets(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of every linear module, and of every matrix or stack of matrices that is a bare parameter.

    The latter are fused experts and routers; embeddings and norms are left out.
    """
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    parameters = [
        f"{name}.{parameter_name}"
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    ]
    return modules, parameters


def zero_start(model: nn.Module, rank: int, seed: int, head_rank: int = 0) -> Any:
    """Wrap a model, in place, in an adapter that changes nothing yet; alpha equals the rank.

    Raises:
        IncompatiblePairError: PEFT adapts something else than asked for. It takes `gate_proj` and its like for experts
            in every architecture that has experts, so a model that has dense layers as well cannot be the student.
    """
    from peft import LoraConfig, get_peft_model

    modules, parameters = adapter_targets(model)
    pattern = {"lm_head": head_rank} if head_rank else {}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        lora_dropout=0.0,
        bias="none",
        target_modules=modules,
        target_parameters=parameters,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    adapted = sum(".lora_B." in name for name, _ in wrapped.named_parameters())
    if adapted != len(modules) + len(parameters) or config.rank_pattern != pattern:
        raise IncompatiblePairError(
            f"PEFT adapts {adapted} tensors of {type(model).__name__}, expected {len(modules) + len(parameters)}",
            "Choose a student without dense layers beside its experts",
        )
    return wrapped


def learning_rate_factor(step: int, steps: int, warm_up: float) -> float:
    """Share of the peak at step 0 … steps-1: a linear rise to 1, then half a cosine that ends just above 0."""
    rising = max(1, math.ceil(warm_up * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / (steps - rising)))


def train(student: Path, teacher: TeacherRecord, learning_rate: float, training: Training) -> TrainedAdapter:
    """Train an adapter for the student in a folder on the text that the teacher has read.

    The student computes in float32 on the device of the teacher's head; every forward pass goes through PEFT.
    """
    sequences = torch.from_numpy(teacher.text.sequences)
    batch = training.step_tokens // teacher.text.length
    if batch < 1:
        raise UsageError(
            f"A step of {training.step_tokens} tokens holds no sequence of {teacher.text.length}",
            "Give more tokens a step",
        )
    device = teacher.head.weight.device
    peft_model = zero_start(
        load_model(student, str(device), torch.float32), training.rank, training.seed, training.head_rank
    )
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, betas=training.betas, weight_decay=0.0)
    orders = torch.Generator().manual_seed(training.seed)
    batches = [
        rows for _ in range(training.epochs) for rows in torch.randperm(len(sequences), generator=orders).split(batch)
    ]
    losses: list[float] = []
    start = time.perf_counter()
    for step, rows in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(step, len(batches), training.warm_up)
        loss = _divergence(peft_model.get_base_model(), teacher, sequences, rows)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, training.clip)
        optimiser.step()
    seconds = time.perf_counter() - start
    finite = math.isfinite(losses[-1]) and all(bool(parameter.isfinite().all()) for parameter in trained)
    return TrainedAdapter(peft_model, learning_rate, len(losses), seconds, tuple(losses), not finite)


def search(
    student: Path,
    teacher: TeacherRecord,
    tuning: TeacherRecord,
    training: Training,
    grid: Sequence[float] = GRID,
) -> Search:
    """Train once with every learning rate of the grid and keep the run with the lowest KL on the tuning text.

    While the best is the smallest or the greatest, the grid grows by one on that side, threefold or so; a single rate
    is taken as it is.
    """
    waiting, tuning_kl, seconds = sorted(grid), dict[float, float](), 0.0
    best: TrainedAdapter | None = None
    while waiting:
        run = train(student, teacher, waiting.pop(0), training)
        seconds += run.seconds
        kl = math.inf if run.diverged else _kl(run.peft_model.get_base_model(), tuning)
        if best is None or kl < tuning_kl[best.learning_rate]:
            best = run
        tuning_kl = dict(sorted({**tuning_kl, run.learning_rate: kl}.items()))
        if not waiting and len(grid) > 1:
            waiting = _beyond(tuning_kl, best.learning_rate)
    if best is None or not math.isfinite(tuning_kl[best.learning_rate]):
        raise BadDataError("Training diverged with every learning rate", "Try smaller ones")
    return Search(best, tuning_kl, seconds)


def check_saved(run: TrainedAdapter, student: Path, text: TeacherRecord, folder: Path) -> float:
    """Save the adapter, load it into a fresh student as a user would, and return by how much KL differs.

    Raises:
        BadDataError: The loaded adapter is another one than was trained (KL off by 1e-4 nats or more).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT offers to save the head in full because it is adapted
        run.peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    loaded = AdaptedStudent.load(load_model(student, str(text.head.weight.device), torch.float32), folder)
    difference = abs(_kl(loaded.model, text) - _kl(run.peft_model.get_base_model(), text))
    if not difference < _SAME_KL:
        raise BadDataError(
            f"The adapter saved in {folder} gives another KL than the trained one (off by {difference:.2g})",
            "Check the version of PEFT",
        )
    return difference


def _divergence(model: Any, teacher: TeacherRecord, sequences: Tensor, rows: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) of some sequences in nats per predicted token."""
    ids = sequences[rows].to(teacher.head.weight.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    wanted = teacher.head.logits(teacher.hidden[rows].flatten(0, 1))
    return kl_divergence(wanted, logits[:, : teacher.vocabulary]).mean()


def _kl(model: Any, text: TeacherRecord) -> float:
    return measure(model, text).figures.kl


def _beyond(tuning_kl: dict[float, float], best: float) -> list[float]:
    """The next learning rate on the side where the best one stands at the edge; none where it does not."""
    tried = list(tuning_kl)
    if best == tried[0]:
        following = best / 3 if len(tried) < 2 else best * best / tried[1]
    elif best == tried[-1]:
        following = best * best / tried[-2]
    else:
        return []
    following = float(f"{following:.1g}")
    return [following] if _GRID_LIMITS[0] <= following <= _GRID_LIMITS[1] else []
