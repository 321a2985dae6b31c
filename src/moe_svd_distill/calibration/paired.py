"""One text as teacher and student each read it, and what of the two can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from moe_svd_distill.calibration.division import divide, divide_text
from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.calibration.rows import pack_pair
from moe_svd_distill.calibration.text import TokenizedText
from moe_svd_distill.calibration.tokenizer import IntArray, load_tokenizer
from moe_svd_distill.calibration.vocabulary import (
    common_tokens,
    compare_vocabularies,
    read_vocabulary,
    require_shared_vocabulary,
)

VocabularyMode: TypeAlias = Literal["equal", "shared"]


@dataclass(frozen=True)
class PairedText:
    """The same documents in the tokens of both models.

    Attributes:
        student: As the student reads it, (n, length).
        teacher: As the teacher reads it, (n, length); the same object if both read it alike. Row i of both begins at
            the same character and holds the same text.
        student_position: Flat positions in `student.sequences`, (positions,), ascending. At each of these …
        teacher_position: … and the one beside it in `teacher.sequences`, (positions,), both models have read exactly
            the same characters since the beginning of their rows, and some of them of the document they are in.
        student_ids: Rows of the student's head, (common,), ascending, that stand for the same text …
        teacher_ids: … as these of the teacher's, (common,).
    """

    student: TokenizedText
    teacher: TokenizedText
    student_position: IntArray
    teacher_position: IntArray
    student_ids: IntArray
    teacher_ids: IntArray

    @property
    def identical(self) -> bool:
        """Whether both models read the same tokens, so that every position and token is its own partner."""
        return self.student is self.teacher

    @property
    def aligned(self) -> float:
        """Share of the student's tokens at which the two can be compared."""
        return len(self.student_position) / self.student.tokens

    def beginning(self, tokens: int) -> PairedText:
        """The first sequences, of about as many tokens together, and at least one."""
        count = min(max(1, tokens // self.student.length), len(self.student.sequences))
        student = _beginning(self.student, count)
        teacher = student if self.identical else _beginning(self.teacher, count)
        inside = self.student_position < count * self.student.length
        return replace(
            self,
            student=student,
            teacher=teacher,
            student_position=self.student_position[inside],
            teacher_position=self.teacher_position[inside],
        )


def pair_text(
    documents: Sequence[Document],
    teacher_folder: str | Path,
    student_folder: str | Path,
    budgets: Mapping[str, int],
    *,
    length: int = 512,
    mode: VocabularyMode = "equal",
    seed: int = 0,
) -> dict[str, PairedText]:
    """Draw the parts of a text (see `divide_text`) and tokenise them for both models.

    Conversations are rendered by the student's chat template for both; a teacher of another family reads the student's
    turn markers as plain characters. Budgets are in student tokens.

    Args:
        documents: Text from `read_documents`.
        teacher_folder: The teacher with its tokenizer.
        student_folder: The student with its tokenizer.
        budgets: Name of the part → tokens.
        length: Tokens of one sequence, for both models.
        mode: `equal` demands that both number their tokens alike. `shared` takes any two tokenizers and pairs what
            they have in common; where they are equal anyway it does the same as `equal`.
        seed: Of the order of documents.

    Raises:
        IncompatiblePairError: The vocabularies differ in mode `equal`, or have nothing in common.
        BadDataError: There is too little text.
        UsageError: A budget is not above 0.
    """
    compare = require_shared_vocabulary if mode == "equal" else compare_vocabularies
    comparison = compare(teacher_folder, student_folder)
    tokenizer = load_tokenizer(student_folder)
    if comparison.equal:
        texts = divide_text(documents, tokenizer, budgets, length=length, vocabulary=comparison.shared, seed=seed)
        return {name: read_alike(text, comparison.shared) for name, text in texts.items()}
    student_ids, teacher_ids = common_tokens(teacher_folder, student_folder)
    limits = (read_vocabulary(student_folder).rows, read_vocabulary(teacher_folder).rows)
    parts = divide(documents, tokenizer, budgets, length=length, vocabulary=limits[0], seed=seed)
    other = load_tokenizer(teacher_folder)
    result = {}
    for name, part in parts.items():
        rows = pack_pair(part, tokenizer, other, length=length, teacher_vocabulary=limits[1])
        result[name] = PairedText(*rows, student_ids=student_ids, teacher_ids=teacher_ids)
    return result


def read_alike(text: TokenizedText, tokens: int) -> PairedText:
    """A text that both models read in the same tokens, of which they have this many in common."""
    positions, ids = np.arange(text.sequences.size), np.arange(tokens)
    return PairedText(text, text, positions, positions, ids, ids)


def _beginning(text: TokenizedText, count: int) -> TokenizedText:
    return replace(text, sequences=text.sequences[:count], document_of_token=text.document_of_token[:count])
