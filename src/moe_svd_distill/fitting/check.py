"""Text that a fit is judged by: states, the tokens that really follow, and the documents errors are counted over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.algebra.distribution import cross_entropy, kl_divergence, top1_agreement
from moe_svd_distill.calibration.paired import PairedText
from moe_svd_distill.fitting.pairs import HeadWeights, StatePairs

IntArray = NDArray[np.int64]
_LOGIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Places:
    """Where both models predict a token that both have.

    Attributes:
        student_position: Flat positions in the student's sequences, (n,).
        teacher_position: The same for the teacher.
        target: The token that follows, as an index into the common tokens, (n,).
        unit: Document or sequence of that token, numbered without gaps, (n,).
    """

    student_position: IntArray
    teacher_position: IntArray
    target: IntArray
    unit: IntArray


@dataclass(frozen=True, eq=False)
class DocumentSums:
    """KL, cross-entropy, agreement and tokens of each document, each (documents,)."""

    kl: NDArray[np.float64]
    cross_entropy: NDArray[np.float64]
    agreement: NDArray[np.float64]
    tokens: NDArray[np.float64]


def predicting_places(text: PairedText) -> Places:
    """The places of a text whose next token lies in the same sequence and is one of the common tokens."""
    sequences = text.student.sequences
    length = sequences.shape[1]
    inside = text.student_position % length < length - 1
    student, teacher = text.student_position[inside], text.teacher_position[inside]
    following = student + 1
    common = np.full(int(max(sequences.max(), text.student_ids.max())) + 1, -1, dtype=np.int64)
    common[text.student_ids] = np.arange(len(text.student_ids))
    target = common[sequences.reshape(-1)[following]]
    real = (target >= 0) & (text.student.document_of_token.reshape(-1)[following] >= 0)
    _, unit = np.unique(np.asarray(text.student.units()).reshape(-1)[following[real]], return_inverse=True)
    return Places(student[real], teacher[real], target[real], unit.astype(np.int64))


@torch.no_grad()
def figures_by_document(pairs: StatePairs, places: Places, student: HeadWeights, teacher: HeadWeights) -> DocumentSums:
    """Figures over the common tokens, summed for each document.

    Args:
        pairs: States at exactly these places, in this order.
        places: Targets and documents.
        student: The student's head over the common tokens.
        teacher: The teacher's.
    """
    device = student.weight.device
    step = max(1, _LOGIT_BYTES // (4 * len(student.weight)))
    columns: list[Tensor] = []
    begin = 0
    for mine, theirs in pairs.in_order(step, device):
        wanted, found = teacher.logits(theirs), student.logits(mine)
        target = torch.from_numpy(places.target[begin : begin + len(mine)]).to(device)
        begin += len(mine)
        columns.append(
            torch.stack(
                [
                    kl_divergence(wanted, found).double(),
                    cross_entropy(found, target).double(),
                    top1_agreement(wanted, found).double(),
                ]
            ).cpu()
        )
    return summed(torch.cat(columns, dim=1), places)


def summed(columns: Tensor, places: Places) -> DocumentSums:
    """Figures of single places, summed for each document.

    Args:
        columns: KL, cross-entropy and agreement of every place, (3, n).
        places: Whose documents.
    """
    kl, entropy, agreement = (_by_document(column, places.unit) for column in columns.double().numpy())
    return DocumentSums(kl, entropy, agreement, _by_document(np.ones(len(places.unit)), places.unit))


def _by_document(values: NDArray[np.float64], unit: IntArray) -> NDArray[np.float64]:
    return np.bincount(unit, weights=values).astype(np.float64)
