"""What became of every tensor of the student, for run.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from moe_svd_distill.pairing.plan import Pairing
from moe_svd_distill.pipeline.pair import Model

if TYPE_CHECKING:
    from moe_svd_distill.pipeline.stage import StageResult
    from moe_svd_distill.training.lora_pairs import Pair
    from moe_svd_distill.transfer.facts import TensorFacts, UnitFacts

NOT_TRAINED = "the refined stage trains the matrices of the layers and the head alone"
HEAD_STANDS_STILL = (
    "the head stands still: fewer than four tokens of text for each of its rows, or training.head: fixed"
)
NOT_PAIRED = "the weights stage does not know what it means"
NOT_FITTED = "the calibrated stage changes the head and the last layers alone"


def tensor_records(units: Iterable[UnitFacts]) -> list[TensorFacts]:
    """The record of every student tensor, each with its layer."""
    return [{**tensor, "layer": unit["layer"]} for unit in units for tensor in unit["tensors"]]


def is_nothing(tensors: Iterable[TensorFacts]) -> bool:
    """Whether every delta is exactly zero."""
    return not any(tensor.get("delta_norm") for tensor in tensors)


def summarise(tensors: Iterable[TensorFacts]) -> Mapping[str, Mapping[str, object]]:
    """Counts of fates, reasons, projections and alignments."""
    rows = list(tensors)
    return {
        "fates": dict(Counter(row["fate"] for row in rows)),
        "reasons_to_keep": dict(Counter(row["reason"] for row in rows if row["fate"] == "kept")),
        "projections": dict(Counter(row["projection"] for row in rows if "projection" in row)),
        "projection_fallbacks": {
            row["name"]: row["projection_fallback"] for row in rows if "projection_fallback" in row
        },
        "alignments": dict(Counter(row["alignment"] for row in rows if "alignment" in row)),
    }


def fates(
    student: Model,
    plan: Pairing | None,
    units: Iterable[UnitFacts],
    results: Mapping[str, StageResult],
    whole: bool,
) -> list[TensorFacts]:
    """The fate of every tensor of the student, as the last stage that changed it has left it.

    Args:
        student: The student.
        plan: Of the weights stage, if there was one.
        units: Records of its units.
        results: Stages on text that were run, in order. On top of the weights stage one counts where it was kept.
        whole: Whether a changed head is saved whole.
    """
    tensors, reason = tensor_records(units), NOT_PAIRED
    reasons = dict(plan.ignored_student) if plan else {}
    for stage, result in results.items():
        reason = NOT_TRAINED if stage == "refined" else NOT_FITTED
        if plan is not None and stage == "calibrated" and not result.search.accepted:
            continue
        if result.head is None:
            reasons[student.architecture.head] = HEAD_STANDS_STILL
        rows = fitted_records(student, result, whole, stage)
        changed = {row["name"] for row in rows}
        tensors = [row for row in tensors if row["name"] not in changed] + rows
    return tensors + kept_records(student, [row["name"] for row in tensors], reason, reasons)


def fitted_records(student: Model, fitted: StageResult, whole: bool, stage: str) -> list[TensorFacts]:
    """The fate of every matrix that a stage on text changes: the head first, then those of the layers."""
    pairs = [_fitted_record(student, name, factors, stage) for name, factors in fitted.pairs.items()]
    if fitted.head is None:
        return pairs
    assert fitted.head_delta is not None
    left, right = fitted.head
    head: TensorFacts = {
        "name": student.architecture.head,
        "role": "head",
        "shape": [left.shape[0], right.shape[1]],
        "fate": "lora",
        "rank": left.shape[1],
        "format": "whole" if whole else "pair",
        "stage": stage,
        "delta_norm": float(fitted.head_delta.double().norm()),
        "layer": None,
    }
    return [head, *pairs]


def _fitted_record(student: Model, name: str, factors: Pair, stage: str) -> TensorFacts:
    matrix = student.architecture.by_name.get(name)
    row: TensorFacts = {
        "name": name,
        "role": student.role_of(name),
        "shape": list(student.shapes[name] if matrix is None else matrix.shape),
        "fate": "lora",
        "rank": factors[0].shape[1],
        "stage": stage,
        "delta_norm": float((factors[0].float() @ factors[1].float()).double().norm()),
        "layer": None if matrix is None else matrix.part,
    }
    if not row["delta_norm"]:
        row["reason"] = "no gradient reached it: its pair is zero"
    return row if matrix is None or matrix.piece.index is None else row | {"expert": matrix.piece.index}


def kept_records(
    student: Model, named: Iterable[str], reason: str, reasons: Mapping[str, str] | None = None
) -> list[TensorFacts]:
    """The fate of every stored tensor of the model of which no matrix has a record yet.

    Args:
        student: The student.
        named: Names of the matrices, or parts of matrices, that have one.
        reason: Why they are kept that could be changed.
        reasons: Stored tensor to a reason of its own.
    """
    architecture, meanings = student.architecture, student.layout.meanings
    known = set(named)
    known |= {meanings[name].view.stored for name in known if name in meanings}
    rows: list[TensorFacts] = []
    for part, sources in architecture.stored.of_part.items():
        for source in sources:
            inside = [m for slot in source.slots for m in architecture.parameters.get(slot.name, ())]
            if any(m.name in known and not m.stored for m in inside):
                continue
            against = [student.keys.left_out[m.name] for m in inside if m.name in student.keys.left_out]
            for name in source.hub_names:
                if name not in known:
                    known.add(name)
                    own = (reasons or {}).get(name) or student.keys.left_out.get(name)
                    why = own or (against[0] if against else reason)
                    rows.append(
                        {
                            "name": name,
                            "role": student.role_of(name),
                            "shape": list(student.shapes[name]),
                            "fate": "kept",
                            "reason": why,
                            "layer": part if isinstance(part, int) else None,
                        }
                    )
    return rows
