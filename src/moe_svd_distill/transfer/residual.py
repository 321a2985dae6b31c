"""The map of the residual stream for the ``procrustes`` projection, from the words both models embed."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from moe_svd_distill.algebra.residual_map import vocabulary_procrustes
from moe_svd_distill.errors import IncompatiblePairError

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.checkpoints import Checkpoint

EMBEDDING = "model.embed_tokens.weight"
ROWS = 16384  # more rows change nothing: the map has far fewer degrees of freedom


@lru_cache(maxsize=2)
def residual_map(teacher: Checkpoint, student: Checkpoint, device: str) -> Tensor:
    """(student width, teacher width) map, the same in every worker.

    Raises:
        IncompatiblePairError: The vocabularies differ in size, so rows cannot be paired.
    """
    rows, own_rows = teacher[EMBEDDING].shape[0], student[EMBEDDING].shape[0]
    if rows != own_rows:
        raise IncompatiblePairError(
            f"projection procrustes pairs vocabulary rows, but the teacher has {rows} and the student {own_rows}",
            "Choose another projection",
        )
    kept = slice(0, min(rows, ROWS))
    found = vocabulary_procrustes(teacher.read(EMBEDDING)[kept].float(), student.read(EMBEDDING)[kept].float())
    return found.matrix.to(device)
