"""The map of the residual stream for the ``procrustes`` projection, from the words both models embed."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from moe_svd_distill.algebra.residual_map import vocabulary_procrustes
from moe_svd_distill.errors import IncompatiblePairError

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.checkpoints import Checkpoint

ROWS = 16384  # more rows change nothing: the map has far fewer degrees of freedom


@lru_cache(maxsize=2)
def residual_map(teacher: Checkpoint, student: Checkpoint, embeddings: tuple[str, str] | None, device: str) -> Tensor:
    """(student width, teacher width) map, the same in every worker.

    Args:
        teacher: The teacher.
        student: The student.
        embeddings: Names of the teacher's and the student's embeddings.
        device: Where to put it.

    Raises:
        IncompatiblePairError: Embeddings are not known, or differ in size, so rows cannot be paired.
    """
    if embeddings is None:
        raise IncompatiblePairError(
            "projection procrustes pairs vocabulary rows, but the embeddings are not known", "Choose another projection"
        )
    rows, own_rows = teacher[embeddings[0]].shape[0], student[embeddings[1]].shape[0]
    if rows != own_rows:
        raise IncompatiblePairError(
            f"projection procrustes pairs vocabulary rows, but the teacher has {rows} and the student {own_rows}",
            "Choose another projection",
        )
    kept = slice(0, min(rows, ROWS))
    found = vocabulary_procrustes(teacher.read(embeddings[0])[kept].float(), student.read(embeddings[1])[kept].float())
    return found.matrix.to(device)
