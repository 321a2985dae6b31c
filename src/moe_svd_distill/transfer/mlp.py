"""A gated MLP, dense or shared expert: gate, up and down together, because a permutation of neurons moves all three."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_svd_distill.algebra.matching import match_neurons
from moe_svd_distill.algebra.permutation import permute_neurons
from moe_svd_distill.pairing.unit import TensorTask
from moe_svd_distill.transfer.context import CORRESPONDENCE, UnitContext, by_role, folded, source_facts
from moe_svd_distill.transfer.factors import Delta, factorise, make_delta
from moe_svd_distill.transfer.outcome import TensorOutcome, kept

if TYPE_CHECKING:
    from torch import Tensor

    Gated = tuple[Tensor, Tensor, Tensor]


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
    tasks: list[TensorTask], teacher: Gated, facts: list[dict[str, Any]], context: UnitContext
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
    deltas = []
    for task, source, own, known in zip(tasks, teacher, (own_gate, own_up, own_down), facts, strict=True):
        target, how = context.bring(task, source)
        target, how = folded(target, context.gain_ratio(task), {**known, **how, **alignment})
        deltas.append(make_delta(task, target, own, how, context.settings))
    return deltas


def align_neurons(teacher: Gated, student: Gated, context: UnitContext) -> tuple[Gated, dict[str, Any]]:
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
    facts: dict[str, Any] = {"matched_similarity": matching.similarity}
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
            target, how = context.bring(task, context.reader.blend(task.sources))
            target, how = folded(target, context.gain_ratio(task), {**source_facts(task), **how})
            delta = make_delta(task, target, context.reader.student(task.view), how, context.settings)
            outcomes.append(factorise(delta, context.settings))
    return outcomes
