"""Whether two matrices share an origin: cosines of rows, of rows found again elsewhere, and of columns.

Every figure comes with its control: the same measurement on the same numbers with the correspondence destroyed. The
absolute cosine means little, because models trained on the same text share directions (token frequency above all).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

CONTROLS = 256  # rows the control of a search is measured on, at most
SHIFTS = 4  # wrong pairings of the rows that the control of row_similarity averages over


@dataclass(frozen=True)
class Similarity:
    """A mean cosine and what it would be by chance.

    Attributes:
        cosine: Mean over the items.
        chance: The same mean where nothing corresponds.
        spread: Standard deviation of the cosine of one pair that does not correspond.
    """

    cosine: float
    chance: float
    spread: float


def row_similarity(teacher: Float[Tensor, "n d"], student: Float[Tensor, "n d"]) -> Similarity:
    """Cosine of rows of the same number, after the mean row is taken off; the control pairs them wrongly.

    Raises:
        ValueError: fewer than two rows, which leaves none to pair wrongly.
    """
    if len(teacher) < 2:
        raise ValueError(f"{len(teacher)} rows cannot be compared with a control, two or more can")
    left, right = _unit(_centred(teacher)), _unit(_centred(student))
    n = len(left)
    shifts = sorted({max(1, n * part // (SHIFTS + 1)) for part in range(1, SHIFTS + 1)})
    wrong = torch.stack([(left.roll(shift, 0) * right).sum(1) for shift in shifts])
    return Similarity(float((left * right).sum(1).mean()), float(wrong.mean()), float(wrong.std()))


def match_best_rows(
    teacher: Float[Tensor, "m d"], student: Float[Tensor, "p d"]
) -> tuple[Int[Tensor, "p"], Similarity]:
    """The teacher row most like each student row, and how alike they are; the control permutes the teacher's columns.

    Blind to the order of the teacher's rows (experts, neurons, heads) and to teacher rows the student lacks. Several
    student rows may choose one teacher row.
    """
    return _best(_unit(teacher.float()), _unit(student.float()))


def match_channels(
    teacher: Float[Tensor, "n d_t"], student: Float[Tensor, "n d_s"]
) -> tuple[Int[Tensor, "d_s"], Similarity]:
    """The teacher column most like each student column, and how alike they are; the control permutes the rows.

    For embeddings the columns are channels of the residual stream, each described by its values at ``n`` tokens: this
    finds the channels of a student that was cropped from the teacher, in whatever order. Give both ``flattened``: raw
    columns of models trained on the same text correlate through token frequency (measured: mean best cosine 0.3 in
    embeddings and 0.7 in heads, 0.1 once flattened; above 0.9 for a cropped student either way).
    """
    return _best(_unit(teacher.mT.float()), _unit(student.mT.float()))


def flattened(matrix: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows brought to length one, the mean row taken off, and the few strong directions weakened to the common level.

    With the SVD ``U diag(s) V^T`` the result is ``U diag(s / sqrt(s^2 + m)) V^T``, m the mean of ``s^2``: symmetric
    (ZCA) whitening (Kessy, Lewin, Strimmer 2018) with a ridge, which keeps channels where they are and does not raise
    weak directions to the level of strong ones. By the eigenvectors of the smaller Gram matrix, in float32.
    """
    rows = _centred(_unit(matrix.float()))
    wide = rows.shape[0] <= rows.shape[1]
    gram = rows @ rows.mT if wide else rows.mT @ rows
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0.0)
    ridge = values.mean().clamp_min(torch.finfo(torch.float32).tiny)
    weaken = (vectors * (values + ridge).rsqrt()) @ vectors.mT
    return weaken @ rows if wide else rows @ weaken


def _centred(rows: Tensor) -> Tensor:
    wide = rows.float()
    return wide - wide.mean(0)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _best(left: Tensor, right: Tensor) -> tuple[Tensor, Similarity]:
    """Best cosine of each row of ``right`` among those of ``left``, both of unit rows."""
    best, index = (right @ left.mT).max(1)
    some = right[:: -(-len(right) // CONTROLS)]
    wrong = some @ left[:, _order(left.shape[1], left.device)].mT
    similarity = Similarity(float(best.mean()), float(wrong.amax(1).mean()), float(wrong.std(unbiased=False)))
    return index, similarity


def _order(count: int, device: torch.device) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device)
