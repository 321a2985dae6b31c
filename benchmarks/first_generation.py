"""The described first-generation method, tensor by tensor with exact SVDs: the yardstick of the whole-run benchmark.

Written from the public description (linear depth map, linear interpolation, mean-centred and scaled truncated SVD cut
to the student's shape, raw fingerprints clustered by scikit-learn's k-means, blend by Frobenius norm, cluster number =
expert number, exact SVD of the difference), under the names real checkpoints use. The factors are made and dropped.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint


def run(teacher_folder: Path, student_folder: Path, rank: int, restarts: int) -> int:
    """Distil the pair with so many restarts of k-means; returns how many student tensors were done."""
    with open_checkpoint(teacher_folder) as teacher, open_checkpoint(student_folder) as student:
        layers, teacher_layers = student.config["num_hidden_layers"], teacher.config["num_hidden_layers"]
        done = 0
        for layer in range(layers):
            position = layer * teacher_layers / layers
            lower = int(position)
            upper = min(lower + 1, teacher_layers - 1)
            done += _layer(teacher, student, layer, (lower, upper, position - lower), rank, restarts)
        head = "lm_head.weight"
        factors(project(teacher.read(head).float(), student[head].shape) - student.read(head).float(), rank)
    return done + 1


def _layer(
    teacher: Checkpoint, student: Checkpoint, layer: int, step: tuple[int, int, float], rank: int, restarts: int
) -> int:
    lower, upper, weight = step

    def interpolated(tail: str) -> Tensor:
        first = teacher.read(f"model.layers.{lower}.{tail}").float()
        return torch.lerp(first, teacher.read(f"model.layers.{upper}.{tail}").float(), weight)

    done = 0
    for tail in [f"self_attn.{side}_proj.weight" for side in "qkvo"] + ["mlp.gate.weight"]:
        own = student.read(f"model.layers.{layer}.{tail}").float()
        factors(project(interpolated(tail), own.shape) - own, rank)
        done += 1
    experts, clusters = teacher.config["num_experts"], student.config["num_experts"]
    sides = ("gate_proj", "up_proj", "down_proj")
    fingerprints = torch.stack(
        [
            torch.cat([interpolated(f"mlp.experts.{expert}.{side}.weight").flatten() for side in sides])
            for expert in range(experts)
        ]
    )
    labels = KMeans(clusters, n_init=restarts, random_state=42).fit(fingerprints.numpy()).labels_
    del fingerprints
    for cluster in range(clusters):
        members = [expert for expert in range(experts) if labels[expert] == cluster]
        for side in sides:
            own = student.read(f"model.layers.{layer}.mlp.experts.{cluster}.{side}.weight").float()
            projected = [project(interpolated(f"mlp.experts.{expert}.{side}.weight"), own.shape) for expert in members]
            weights = torch.stack([torch.linalg.vector_norm(matrix) for matrix in projected])
            weights = weights / weights.sum()
            blended = sum(matrix * share for matrix, share in zip(projected, weights, strict=True))
            factors(torch.as_tensor(blended) - own, rank)
            done += 1
    return done


def project(matrix: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Mean-centred, scaled, rank-k truncated SVD with k the least of the four dimensions, then the top-left block."""
    rows, columns = shape
    mean, spread = matrix.mean(), matrix.std()
    U, S, Vh = torch.linalg.svd((matrix - mean) / spread, full_matrices=False)
    k = min(*matrix.shape, rows, columns)
    truncated = (U[:, :k] * S[:k]) @ Vh[:k]
    target = torch.zeros(rows, columns)
    common = (min(rows, matrix.shape[0]), min(columns, matrix.shape[1]))
    target[: common[0], : common[1]] = truncated[: common[0], : common[1]]
    return target * spread + mean


def factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """LoRA B and A by the exact SVD."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    root = S[:rank].sqrt()
    return (U[:, :rank] * root).to(torch.bfloat16), (root[:, None] * Vh[:rank]).to(torch.bfloat16)
