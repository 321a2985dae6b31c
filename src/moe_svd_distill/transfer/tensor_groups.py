"""How the tensors of a unit that belong together are transferred: attention, MLPs, routed experts, embeddings and head.

q, k, v and o go together, because a permutation of heads moves all four; so do gate, up and down, because a permutation
of neurons moves all three. Every student expert becomes the blend of the teacher experts of its cluster, brought to its
shape; its router row becomes the blend of their router rows, so that tokens go on reaching what they used to reach in
the teacher. Embeddings and head go in blocks of vocabulary rows: they can be larger than all the rest of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from moe_svd_distill.algebra.low_rank import low_rank_of_blocks
from moe_svd_distill.algebra.matching import match_attention_heads, match_neurons, permute_heads, permute_neurons
from moe_svd_distill.algebra.sparsity import keep_largest
from moe_svd_distill.pairing.plan import EXPERTS
from moe_svd_distill.pairing.unit import TensorTask, WeightedView
from moe_svd_distill.transfer.context import CORRESPONDENCE, UnitContext, by_role, source_facts
from moe_svd_distill.transfer.expert_matching import Members, group_experts
from moe_svd_distill.transfer.factors import (
    Delta,
    TensorOutcome,
    changed,
    factorise,
    factorise_group,
    kept,
)
from moe_svd_distill.transfer.facts import TensorFacts

if TYPE_CHECKING:
    from torch import Tensor

    Gated = tuple[Tensor, Tensor, Tensor]


ATTENTION = ("attention.q", "attention.k", "attention.v", "attention.o")
EXPERTS_AT_ONCE = 4  # experts whose deltas are held in float32 together
BLOCK_ENTRIES = 1 << 24  # of embeddings and head: 64 MiB in float32


def transfer_attention(tasks: tuple[TensorTask, ...], context: UnitContext) -> list[TensorOutcome]:
    """LoRA pairs of the four projections."""
    group = by_role(tasks, *ATTENTION)
    changing = [task for task in group if task.change]
    outcomes = [kept(task, task.reason) for task in group if not task.change]
    teacher = {task.role: context.reader.blend(task.sources) for task in changing}
    student = {task.role: context.reader.student(task.view) for task in changing}
    teacher, facts = _align(teacher, student, context)
    for task in changing:
        delta = context.delta(task, teacher.pop(task.role), student.pop(task.role), source_facts(task), facts)
        outcomes.append(factorise(delta, context.settings))
    return outcomes


def _align(
    teacher: dict[str, Tensor], student: dict[str, Tensor], context: UnitContext
) -> tuple[dict[str, Tensor], TensorFacts]:
    """The teacher's heads in the student's order, where a correspondence exists."""
    if context.settings.alignment == "none" or len(teacher) < len(ATTENTION):
        return teacher, {}
    if not context.same_width or not _same_heads(teacher, student, context):
        return teacher, {"alignment": "none: widths or numbers of heads differ"}
    size = context.student.head_dimension
    q, k, v, o = (teacher[role] for role in ATTENTION)
    own_q, own_k, own_v, own_o = (student[role] for role in ATTENTION)
    kv, query = match_attention_heads((q, k, v, o), (own_q, own_k, own_v, own_o), size)
    similarity = min(kv.similarity, query.similarity)
    facts: TensorFacts = {"matched_similarity": similarity}
    if similarity < CORRESPONDENCE:
        return teacher, {**facts, "alignment": "none: no correspondence of heads"}
    if kv.is_identity and query.is_identity:
        return teacher, {**facts, "alignment": "heads in the same order"}
    permuted = permute_heads((q, k, v, o), kv.teacher_index, query.teacher_index, size)
    order = {"key_value_heads": kv.teacher_index.tolist(), "query_heads": query.teacher_index.tolist()}
    return dict(zip(ATTENTION, permuted, strict=True)), {**facts, "alignment": "heads permuted", "permutation": order}


def _same_heads(teacher: dict[str, Tensor], student: dict[str, Tensor], context: UnitContext) -> bool:
    """Whether both have as many heads of one size, and these layers are no exception."""
    own, other = context.student, context.teacher
    sizes = (own.query_heads * own.head_dimension, own.key_value_heads * own.head_dimension)
    return (
        own.head_dimension == other.head_dimension
        and sizes == (other.query_heads * other.head_dimension, other.key_value_heads * other.head_dimension)
        and sizes == (student["attention.q"].shape[0], student["attention.k"].shape[0])
        and all(teacher[role].shape == student[role].shape for role in ATTENTION)
    )


def transfer_mlp(prefix: str, tasks: tuple[TensorTask, ...], context: UnitContext) -> list[TensorOutcome]:
    """LoRA pairs of one MLP.

    Args:
        prefix: ``dense`` or ``shared``.
        tasks: The unit's tasks.
        context: The unit's context.
    """
    group = by_role(tasks, f"{prefix}.gate", f"{prefix}.up", f"{prefix}.down")
    if not all(task.change for task in group) or len(group) < 3:
        return transfer_alone(tuple(group), context)
    gate, up, down = (context.reader.blend(task.sources) for task in group)
    facts = [source_facts(task) for task in group]
    return [factorise(delta, context.settings) for delta in gated_deltas(group, (gate, up, down), facts, context)]


def gated_deltas(
    tasks: list[TensorTask], teacher: Gated, facts: list[TensorFacts], context: UnitContext
) -> list[Delta]:
    """Deltas of gate, up and down from a teacher's MLP of any width.

    Args:
        tasks: The student's (gate, up, down).
        teacher: The teacher's, (neurons, hidden), (neurons, hidden), (hidden, neurons).
        facts: What is known of each, for the record.
        context: The unit's context.
    """
    own_gate, own_up, own_down = (context.reader.student(task.view) for task in tasks)
    teacher, alignment = align_neurons(teacher, (own_gate, own_up, own_down), context)
    each = zip(tasks, teacher, (own_gate, own_up, own_down), facts, strict=True)
    return [context.delta(task, source, own, known, alignment) for task, source, own, known in each]


def align_neurons(teacher: Gated, student: Gated, context: UnitContext) -> tuple[Gated, TensorFacts]:
    """The teacher's neurons that are the student's, in the student's order, where a correspondence exists.

    A teacher with more neurons is cut down to the matching ones; without a correspondence it is returned unchanged.
    """
    if context.settings.alignment == "none":
        return teacher, {}
    if not context.same_width:
        return teacher, {"alignment": "none: widths differ"}
    if teacher[0].shape[0] < student[0].shape[0]:
        return teacher, {"alignment": "none: the teacher has fewer neurons"}
    matching = match_neurons(*teacher, *student)
    facts: TensorFacts = {"matched_similarity": matching.similarity}
    if matching.similarity < CORRESPONDENCE:
        return teacher, {**facts, "alignment": "none: no correspondence of neurons"}
    if matching.is_identity and teacher[0].shape[0] == student[0].shape[0]:
        return teacher, {**facts, "alignment": "neurons in the same order"}
    permuted = permute_neurons(*teacher, matching.teacher_index)
    return permuted, {**facts, "alignment": "neurons permuted", "permutation": matching.teacher_index.tolist()}


def transfer_alone(tasks: tuple[TensorTask, ...], context: UnitContext) -> list[TensorOutcome]:
    """LoRA pairs of matrices without companions to align with, one by one."""
    outcomes = [kept(task, task.reason) for task in tasks if not task.change]
    for task in tasks:
        if task.change:
            matrix, own = context.reader.blend(task.sources), context.reader.student(task.view)
            outcomes.append(factorise(context.delta(task, matrix, own, source_facts(task)), context.settings))
    return outcomes


def transfer_experts(tasks: tuple[TensorTask, ...], context: UnitContext) -> list[TensorOutcome]:
    """LoRA pairs of all routed experts of a layer and of its router."""
    routed = sorted((t for t in tasks if t.role in EXPERTS), key=lambda t: (t.expert or 0, EXPERTS.index(t.role)))
    router = next((task for task in tasks if task.role == "router"), None)
    if router is None or not router.change or not routed or not routed[0].change:
        group = routed + ([router] if router else [])
        return [kept(task, task.reason) for task in group]
    experts = [routed[start : start + 3] for start in range(0, len(routed), 3)]
    members, context.facts["experts"] = group_experts(experts, router, context)
    outcomes = [_transfer_router(router, members, context)]
    for first in range(0, len(experts), EXPERTS_AT_ONCE):
        deltas = [
            _expert_deltas(experts[index], members[index], context)
            for index in range(first, min(len(experts), first + EXPERTS_AT_ONCE))
        ]
        for kind in range(3):
            outcomes += factorise_group([group[kind] for group in deltas], context.settings)
        context.report(min(1.0, (first + EXPERTS_AT_ONCE) / len(experts)))
    return outcomes


def _expert_deltas(tasks: Sequence[TensorTask], members: Members, context: UnitContext) -> list[Delta]:
    gate, up, down = (_blend(kind, members, context) for kind in range(3))
    facts: list[TensorFacts] = [{"teacher_experts": [list(member) for member in members]} for _ in range(3)]
    return gated_deltas(list(tasks), (gate, up, down), facts, context)


def _blend(kind: int, members: Members, context: UnitContext) -> Tensor:
    """The blend of a cluster's experts, each interpolated between the two adjacent teacher layers; float32."""
    layers = context.unit.teacher_experts
    total: Tensor | None = None
    for expert, weight in members:
        matrix = context.reader.blend([WeightedView(layer.tensors[expert][kind], layer.weight) for layer in layers])
        total = matrix * weight if total is None else total.add_(matrix, alpha=weight)
    assert total is not None, "a cluster has at least one member"
    return total


def _transfer_router(task: TensorTask, members: Sequence[Members], context: UnitContext) -> TensorOutcome:
    layers = context.unit.teacher_experts
    rows = context.reader.blend([WeightedView(layer.router, layer.weight) for layer in layers])
    blended = torch.stack([sum(rows[expert] * weight for expert, weight in group) for group in members])  # type: ignore[misc]
    facts: TensorFacts = {"sources": [[layer.router.name, layer.weight] for layer in layers]}
    return factorise(context.delta(task, blended, context.reader.student(task.view), facts), context.settings)


def transfer_embedding_and_head(tasks: tuple[TensorTask, ...], context: UnitContext) -> list[TensorOutcome]:
    """LoRA pairs of the embeddings and the head."""
    ends = [task for task in tasks if task.role in ("embedding", "head")]
    return [_transfer_end(task, context) if task.change else kept(task, task.reason) for task in ends]


def _transfer_end(task: TensorTask, context: UnitContext) -> TensorOutcome:
    ratio = context.gain_ratio(task)
    rows, columns = task.shape
    step = max(1, BLOCK_ENTRIES // columns)
    facts: TensorFacts = source_facts(task)
    student_square = 0.0

    def block(start: int) -> Tensor:
        nonlocal student_square, facts
        stop = min(rows, start + step)
        source = context.reader.teacher_rows(task.sources[0].view, start, stop)
        block_task = replace(task, shape=(stop - start, columns))
        target, how = context.bring(block_task, source)
        facts |= how
        own = context.reader.student_rows(task.view, start, stop)
        student_square += float(own.double().square().sum())
        delta = (target if ratio is None else target * ratio) - own
        if context.settings.delta_sparsity < 1.0:
            return keep_largest(delta, context.settings.delta_sparsity, rescale=True)
        return delta

    blocks = range(0, rows, step)
    factors, norm, passes = low_rank_of_blocks(lambda: map(block, blocks), rows, columns, task.rank)
    student_norm = (student_square / passes) ** 0.5
    if ratio is not None:
        facts["norm"] = "folded"
    outcome = changed(task, factors, norm, student_norm, facts)
    if task.role == "embedding":  # PEFT keeps its pair transposed: A (rank, vocabulary), B (hidden, rank)
        return replace(outcome, pair=(torch.clone(factors.right.mT), torch.clone(factors.left.mT)))
    return outcome
