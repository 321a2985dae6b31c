"""Attention: q, k, v and o together, because a permutation of heads moves all four."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_svd_distill.algebra.matching import match_attention_heads
from moe_svd_distill.algebra.permutation import permute_heads
from moe_svd_distill.pairing.unit import TensorTask
from moe_svd_distill.transfer.context import CORRESPONDENCE, UnitContext, by_role, folded, source_facts
from moe_svd_distill.transfer.factors import factorise, make_delta
from moe_svd_distill.transfer.outcome import TensorOutcome, kept

if TYPE_CHECKING:
    from torch import Tensor

ROLES = ("attention.q", "attention.k", "attention.v", "attention.o")


def transfer_attention(tasks: tuple[TensorTask, ...], context: UnitContext) -> list[TensorOutcome]:
    """LoRA pairs of the four projections."""
    group = by_role(tasks, *ROLES)
    changing = [task for task in group if task.change]
    outcomes = [kept(task, task.reason) for task in group if not task.change]
    teacher = {task.role: context.reader.blend(task.sources) for task in changing}
    student = {task.role: context.reader.student(task.view) for task in changing}
    teacher, facts = _align(teacher, student, context)
    for task in changing:
        target, how = context.bring(task, teacher.pop(task.role))
        target, how = folded(target, context.gain_ratio(task), {**source_facts(task), **how, **facts})
        delta = make_delta(task, target, student.pop(task.role), how, context.settings)
        outcomes.append(factorise(delta, context.settings))
    return outcomes


def _align(
    teacher: dict[str, Tensor], student: dict[str, Tensor], context: UnitContext
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The teacher's heads in the student's order, where a correspondence exists."""
    if context.settings.alignment == "none" or len(teacher) < len(ROLES):
        return teacher, {}
    if not context.same_width or not _same_heads(teacher, student, context):
        return teacher, {"alignment": "none: widths or numbers of heads differ"}
    size = context.student.head_dimension
    q, k, v, o = (teacher[role] for role in ROLES)
    own_q, own_k, own_v, own_o = (student[role] for role in ROLES)
    matching = match_attention_heads((q, k, v, o), (own_q, own_k, own_v, own_o), size)
    facts: dict[str, Any] = {"matched_similarity": matching.similarity}
    if matching.similarity < CORRESPONDENCE:
        return teacher, {**facts, "alignment": "none: no correspondence of heads"}
    if matching.is_identity:
        return teacher, {**facts, "alignment": "heads in the same order"}
    permuted = permute_heads(q, k, v, o, matching.kv_index, matching.query_index, size)
    order = {"key_value_heads": matching.kv_index.tolist(), "query_heads": matching.query_index.tolist()}
    return dict(zip(ROLES, permuted, strict=True)), {**facts, "alignment": "heads permuted", "permutation": order}


def _same_heads(teacher: dict[str, Tensor], student: dict[str, Tensor], context: UnitContext) -> bool:
    """Whether both have as many heads of one size, and these layers are no exception."""
    own, other = context.student, context.teacher
    sizes = (own.query_heads * own.head_dimension, own.key_value_heads * own.head_dimension)
    return (
        own.head_dimension == other.head_dimension
        and sizes == (other.query_heads * other.head_dimension, other.key_value_heads * other.head_dimension)
        and sizes == (student["attention.q"].shape[0], student["attention.k"].shape[0])
        and all(teacher[role].shape == student[role].shape for role in ROLES)
    )
