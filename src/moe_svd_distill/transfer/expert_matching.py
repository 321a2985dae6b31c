"""Which teacher experts each student expert is made from: fingerprints, clusters, assignment.

The fingerprints of a layer are never held: their inner products are added up tensor by tensor, and so are the features
by which a cluster is compared with the student's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from moe_svd_distill.algebra.clustering import (
    assign_clusters,
    gram_blocks,
    gram_of_rows,
    interpolated_gram,
    kmeans_from_gram,
)
from moe_svd_distill.algebra.matching import cosine_similarity, expert_probe_features
from moe_svd_distill.algebra.projection import apply_residual_map
from moe_svd_distill.errors import UsageError
from moe_svd_distill.pairing.unit import ExpertLayer, TensorTask
from moe_svd_distill.roles import TensorView
from moe_svd_distill.transfer.context import UnitContext
from moe_svd_distill.transfer.factors import generator_for

if TYPE_CHECKING:
    from torch import Tensor


PROBES = 8
PIECE_ENTRIES = 1 << 22  # entries of a fingerprint piece over all experts: 16 MiB in float32


Members: TypeAlias = tuple[tuple[int, float], ...]
"""Teacher experts and their weights, which sum to 1."""
_Description: TypeAlias = "tuple[Tensor, Tensor]"
"""What experts are compared by: router rows (experts, hidden) and probe features (experts, features)."""


def group_experts(
    tasks: Sequence[Sequence[TensorTask]], router: TensorTask, context: UnitContext
) -> tuple[tuple[Members, ...], Mapping[str, object]]:
    """Cluster the teacher's experts and assign every cluster to the student expert it resembles most.

    Args:
        tasks: (gate, up, down) of each student expert.
        router: The student's router.
        context: The unit's context.

    Returns:
        The teacher experts behind each student expert; and how that came about, for the record.

    Raises:
        UsageError: The recipe asks for more clusters than the teacher has experts, or fewer than the student has.
    """
    layers = context.unit.teacher_experts
    experts, slots = len(layers[0].tensors), len(tasks)
    context.report(0.0)
    clusters = slots if context.settings.clusters == "student" else int(context.settings.clusters)
    probes = _probes(context)
    description = _describe_teacher(layers, context, probes)
    # A student with more experts than the teacher: the clusters are the experts, and some serve twice.
    clusters = min(clusters, experts)
    gram = _gram(layers, description, clusters, experts, context)
    labels, weights, inertia = _cluster(gram, clusters, experts, context)
    similarity = _similarity(weights, description, _describe_student(tasks, router, context, probes))
    slots_of = _assign(similarity, context.settings.assignment)
    members = tuple(_members(weights[cluster]) for cluster in slots_of)
    chosen = [float(similarity[cluster, slot]) for slot, cluster in enumerate(slots_of)]
    facts = {
        "teacher_experts": experts,
        "clusters": clusters,
        "cluster_of_expert": labels,
        "cluster_of_student_expert": slots_of,
        "assignment_similarity": sum(chosen) / len(chosen),
        "fingerprint": context.settings.fingerprint,
        "inertia": inertia,
    }
    return members, facts


def _cluster(gram: Tensor | None, clusters: int, experts: int, context: UnitContext) -> tuple[list[int], Tensor, float]:
    """Labels, (clusters, experts) blend weights and inertia."""
    if gram is None:
        return list(range(experts)), torch.eye(experts), 0.0
    clustering = kmeans_from_gram(gram, clusters, context.settings.seed)
    weights = clustering.weights
    if context.settings.blend == "frobenius":
        norms = gram.diagonal().clamp_min(0.0).sqrt().to(weights)
        weighted = weights * norms
        total = weighted.sum(1, keepdim=True)
        weights = torch.where(total > 0, weighted / total.clamp_min(torch.finfo(weights.dtype).tiny), weights)
    return clustering.labels.tolist(), weights.cpu(), clustering.inertia


def _gram(
    layers: tuple[ExpertLayer, ...], description: _Description, clusters: int, experts: int, context: UnitContext
) -> Tensor | None:
    """Inner products of the interpolated fingerprints, or None where every expert is its own cluster."""
    if clusters >= experts:
        return None
    if context.settings.fingerprint == "router":
        return gram_of_rows([description[0]], centred=True)
    if context.settings.fingerprint == "function":
        return gram_of_rows([description[1]])
    if len(layers) == 1:
        return gram_of_rows(_pieces(layers[0], context))
    pairs = zip(_pieces(layers[0], context), _pieces(layers[1], context), strict=True)
    spherical = context.settings.interpolation == "spherical"
    return interpolated_gram(*gram_blocks(pairs), layers[1].weight, spherical)


def _pieces(layer: ExpertLayer, context: UnitContext) -> Iterator[Tensor]:
    """The fingerprints of a layer's experts in (experts, columns) pieces of bounded size."""
    experts = len(layer.tensors)
    for kind in range(3):
        views = [tensors[kind] for tensors in layer.tensors]
        rows, columns = layer.shapes[kind]
        step = max(1, PIECE_ENTRIES // (experts * columns))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield torch.stack([context.reader.teacher_rows(view, start, stop).flatten() for view in views])


def _probes(context: UnitContext) -> tuple[Tensor, Tensor]:
    """The same random directions in the teacher's and the student's residual stream, (hidden, probes) each."""
    generator = generator_for(f"probes of {context.unit.label}", context.settings.seed)
    student = torch.randn(context.student.hidden, PROBES, generator=generator).to(context.reader.device)
    return _to_teacher(student, context), student


def _to_teacher(vectors: Tensor, context: UnitContext) -> Tensor:
    if context.residual_map is not None:
        return context.residual_map.mT @ vectors
    lifted = vectors.new_zeros(context.teacher.hidden, vectors.shape[1])
    shared = min(context.teacher.hidden, context.student.hidden)
    lifted[:shared] = vectors[:shared]
    return lifted


def _to_student(vectors: Tensor, context: UnitContext) -> Tensor:
    """Rows in the teacher's residual stream, (n, teacher hidden), as rows in the student's."""
    if context.residual_map is not None:
        return apply_residual_map(vectors, None, context.residual_map)
    shared = min(context.teacher.hidden, context.student.hidden)
    lowered = vectors.new_zeros(vectors.shape[0], context.student.hidden)
    lowered[:, :shared] = vectors[:, :shared]
    return lowered


def _describe_teacher(
    layers: tuple[ExpertLayer, ...], context: UnitContext, probes: tuple[Tensor, Tensor]
) -> _Description:
    """Router rows and probe features of the teacher's experts in the student's residual stream, layers blended."""
    routers, features = [], []
    for layer in layers:
        routers.append(_to_student(context.reader.teacher(layer.router), context))
        rows = [_feature(context.reader.teacher, views, probes[0]) for views in layer.tensors]
        in_student = [
            _to_student(row.reshape(context.teacher.hidden, PROBES).mT, context).mT.reshape(1, -1) for row in rows
        ]
        features.append(torch.cat(in_student))
    if len(layers) == 1:
        return routers[0], features[0]
    weight = layers[1].weight
    return torch.lerp(routers[0], routers[1], weight), torch.lerp(features[0], features[1], weight)


def _describe_student(
    tasks: Sequence[Sequence[TensorTask]], router: TensorTask, context: UnitContext, probes: tuple[Tensor, Tensor]
) -> _Description:
    rows = [_feature(context.reader.student, [task.view for task in group], probes[1]) for group in tasks]
    return context.reader.student(router.view), torch.cat(rows)


def _feature(read: Callable[[TensorView], Tensor], views: Sequence[TensorView], probes: Tensor) -> Tensor:
    gate, up, down = (read(view) for view in views)
    return expert_probe_features(gate[None], up[None], down[None], probes)


def _similarity(weights: Tensor, teacher: _Description, student: _Description) -> Tensor:
    """Cosine similarity of every cluster with every student expert, (clusters, student experts).

    The mean router row is taken off: softmax is blind to it.
    """
    (router, features), (own_router, own_features) = teacher, student
    mix = weights.to(router)
    parts = [mix @ (router - router.mean(0)), mix @ features]
    return cosine_similarity(parts, [own_router - own_router.mean(0), own_features]).mT


def _assign(similarity: Tensor, assignment: str) -> list[int]:
    """The cluster of every student expert."""
    clusters, slots = similarity.shape
    if assignment == "index":
        return [slot % clusters for slot in range(slots)]
    if clusters == slots:
        expert_of_cluster = assign_clusters(similarity).tolist()
        return sorted(range(clusters), key=lambda cluster: expert_of_cluster[cluster])
    if clusters > slots:
        raise UsageError(
            f"experts.clusters is {clusters}, but the student has only {slots} experts to put them in",
            f"Set experts.clusters to {slots} or less",
        )
    # Fewer clusters than student experts: every cluster gets one expert, the others the cluster they resemble most.
    padded = torch.cat([similarity, similarity.new_zeros(slots - clusters, slots)])
    owner = assign_clusters(padded).tolist()
    cluster_of = {expert: cluster for cluster, expert in enumerate(owner) if cluster < clusters}
    nearest = similarity.argmax(0).tolist()
    return [cluster_of.get(slot, nearest[slot]) for slot in range(slots)]


def _members(weights: Tensor) -> Members:
    return tuple((expert, float(weight)) for expert, weight in enumerate(weights.tolist()) if weight)
