"""Compare candidates for the sibling student: `python -m lab.siblings [--tokens N ...]`.

A sibling is an earlier state of the teacher's own training, as it was or led to rest by a short falling learning rate.
Each candidate is judged by how far behind the teacher it is, and by how much of the way the plain weight difference
carries it: the share of KL(teacher || student), and of the gap in cross-entropy, that goes away when a part of the
difference is added to the student.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from lab.architectures import fresh_model
from lab.corpus import read_lines
from lab.measure import compare, heldout_windows
from lab.plan import MODELS, TEXT, WORK, ModelSpec, Schedule, spec_named
from lab.train import snapshot_path
from lab.training import Snapshot, be_deterministic, train

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Transfer:
    """Which part of the difference is added: ranks of body, head and embeddings; None is all of it, 0 nothing."""

    label: str
    body: int | None
    head: int | None = None
    embeddings: int | None = 0


TRANSFERS = (
    Transfer("full", None),
    Transfer("full+emb16", None, embeddings=16),
    Transfer("full+emb", None, embeddings=None),
    Transfer("r16", 16),
    Transfer("r16 head64", 16, head=64),
    Transfer("r16+emb16", 16, embeddings=16),
    Transfer("r32", 32),
)


def _truncated(delta: torch.Tensor, rank: int | None) -> torch.Tensor:
    """Best approximation of each matrix (..., m, n) with the given rank."""
    if rank is None:
        return delta
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


def _incoming_gain(name: str) -> str | None:
    """Name of the norm whose output a linear layer reads, when there is one."""
    if name == "lm_head.weight":
        return "model.norm.weight"
    layer = ".".join(name.split(".")[:3])
    if any(f".self_attn.{role}_proj." in name for role in "qkv"):
        return f"{layer}.input_layernorm.weight"
    if name.endswith((".mlp.gate.weight", ".mlp.experts.gate_up_proj")):
        return f"{layer}.post_attention_layernorm.weight"
    return None


def transferred(teacher: Weights, student: Weights, transfer: Transfer) -> Weights:
    """Student weights plus the chosen part of the difference; norm gains go into the layers that follow them."""
    result = dict(student)
    for name, own in student.items():
        if own.dim() < 2:
            continue
        wanted = teacher[name]
        gain = _incoming_gain(name)
        if gain is not None:
            wanted = wanted * (teacher[gain] / student[gain])
        delta = wanted - own
        if name.startswith("model.embed"):
            delta = _truncated(delta, transfer.embeddings)
        elif name.startswith("lm_head"):
            delta = _truncated(delta, transfer.head)
        elif name.endswith("gate_up_proj"):
            delta = torch.cat([_truncated(half, transfer.body) for half in delta.chunk(2, dim=-2)], dim=-2)
        else:
            delta = _truncated(delta, transfer.body)
        result[name] = own + delta
    return result


def in_half(model: PreTrainedModel) -> Weights:
    """The weights as they are published: rounded to bfloat16."""
    return {name: value.to(torch.bfloat16).float() for name, value in model.state_dict().items()}


def judge(teacher: PreTrainedModel, student: PreTrainedModel, windows: torch.Tensor) -> str:
    """One line of figures for one candidate."""
    of_teacher, of_student = in_half(teacher), in_half(student)
    teacher.load_state_dict(of_teacher)
    student.load_state_dict(of_student)
    before = compare(teacher, student, windows)
    parts = [f"CE {before.student_cross_entropy:.3f} gap {before.gap:.3f} KL {before.kl:.3f}"]
    for transfer in TRANSFERS:
        student.load_state_dict(transferred(of_teacher, of_student, transfer))
        after = compare(teacher, student, windows)
        kl = 100 * (1 - after.kl / before.kl)
        ce = 100 * (before.student_cross_entropy - after.student_cross_entropy) / before.gap
        parts.append(f"{transfer.label} {kl:+.1f}/{ce:+.1f}")
    return " | ".join(parts)


def candidate(spec: ModelSpec, at: float, extra: int, tokens: np.ndarray) -> PreTrainedModel:
    """Branch off `spec` after the fraction `at` and train for `extra` tokens more."""
    snapshot = Snapshot.load(snapshot_path(spec.name, at))
    model = fresh_model(spec.architecture, spec.initial_seed)
    schedule: Schedule = replace(spec.schedule, tokens=extra)
    train(model, tokens, schedule, branch=snapshot, report=lambda line: None)
    return model


def main() -> None:
    """Judge candidates from every snapshot of the teacher and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=float, action="append", help="fraction of the teacher's training")
    parser.add_argument("--tokens", type=int, action="append", help="tokens trained after branching")
    parser.add_argument("--windows", type=int, default=100, help="held-out windows to measure on")
    options = parser.parse_args()
    be_deterministic()
    spec = spec_named("qwen3-moe-teacher")
    teacher = fresh_model(spec.architecture, spec.initial_seed)
    teacher.load_state_dict(torch.load(WORK / spec.name / "final.pt", weights_only=True))
    teacher.eval()
    windows = heldout_windows(MODELS / spec.name, read_lines(TEXT / "heldout.jsonl"), options.windows)
    tokens = np.load(WORK / "train.npy")
    for at in options.at or spec.snapshots:
        for extra in options.tokens or [0, 60_000]:
            student = candidate(spec, at, extra, tokens)
            print(f"at {at:g} +{extra:,}: {judge(teacher, student, windows)}", flush=True)


if __name__ == "__main__":
    main()
