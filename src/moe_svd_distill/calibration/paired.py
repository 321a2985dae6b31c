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
from moe_svd_distill.calibration.text import TokenizedText, tokenize
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

    @classmethod
    def read_alike(cls, text: TokenizedText, shared: int) -> PairedText:
        """A text that both models read as the same tokens, numbered alike up to ``shared``."""
        positions, ids = np.arange(text.sequences.size), np.arange(shared)
        return cls(text, text, positions, positions, ids, ids)

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


class PairTokenizers:
    """Both models' tokenizers and what their vocabularies have in common.

    Attributes:
        comparison: Whether they number their tokens alike.
        student: The student's tokenizer; a pair that numbers its tokens alike needs no other.
    """

    def __init__(self, teacher_folder: str | Path, student_folder: str | Path, mode: VocabularyMode = "equal") -> None:
        """Load them from the models' folders.

        Args:
            teacher_folder: The teacher with its tokenizer.
            student_folder: The student with its tokenizer.
            mode: `equal` demands that both number their tokens alike. `shared` takes any two tokenizers and pairs what
                they have in common; where they are equal anyway it does the same as `equal`.

        Raises:
            IncompatiblePairError: The vocabularies differ in mode `equal`.
        """
        compare = require_shared_vocabulary if mode == "equal" else compare_vocabularies
        self.comparison = compare(teacher_folder, student_folder)
        self.student = load_tokenizer(student_folder)
        self._folders = teacher_folder, student_folder

    def parts(
        self, documents: Sequence[Document], budgets: Mapping[str, int], *, length: int = 512, seed: int = 0
    ) -> dict[str, PairedText]:
        """Draw the parts of a text (see `divide_text`) and tokenise them for both models.

        Conversations are rendered by the student's chat template for both; a teacher of another family reads the
        student's turn markers as plain characters.

        Args:
            documents: Text from `read_text`.
            budgets: Name of the part → student tokens.
            length: Tokens of one sequence, for both models.
            seed: Of the order of documents.

        Raises:
            IncompatiblePairError: The vocabularies have nothing in common.
            BadDataError: There is too little text.
            UsageError: A budget is not above 0.
        """
        if self.comparison.equal:
            shared = self.comparison.shared
            texts = divide_text(documents, self.student, budgets, length=length, vocabulary=shared, seed=seed)
            return {name: PairedText.read_alike(text, shared) for name, text in texts.items()}
        student_ids, teacher_ids = common_tokens(*self._folders)
        teacher_limit, student_limit = (read_vocabulary(folder).rows for folder in self._folders)
        parts = divide(documents, self.student, budgets, length=length, vocabulary=student_limit, seed=seed)
        teacher = load_tokenizer(self._folders[0])
        result = {}
        for name, part in parts.items():
            rows = pack_pair(part, self.student, teacher, length=length, teacher_vocabulary=teacher_limit)
            result[name] = PairedText(*rows, student_ids=student_ids, teacher_ids=teacher_ids)
        return result

    def first(self, documents: Sequence[Document], tokens: int | None, *, length: int, seed: int) -> PairedText:
        """About so many student tokens of a text, in the order of its documents if both models read it alike.

        Args:
            documents: Text from `read_text`.
            tokens: None for all.
            length: Tokens of one sequence, for both models.
            seed: Of the order of documents where the tokenizers differ.

        Raises:
            IncompatiblePairError: The vocabularies have nothing in common.
            BadDataError: There is less than one sequence.
        """
        if self.comparison.equal:
            shared = self.comparison.shared
            return PairedText.read_alike(
                tokenize(documents, self.student, tokens, length=length, vocabulary=shared), shared
            )
        # No text has more tokens than bytes, the one that ends a document and the one that begins it included.
        everything = sum(len(document.text.encode("utf-8", "surrogatepass")) + 2 for document in documents)
        budget = everything if tokens is None else tokens
        return self.parts(documents, {"all": budget}, length=length, seed=seed)["all"]


def _beginning(text: TokenizedText, count: int) -> TokenizedText:
    return replace(text, sequences=text.sequences[:count], document_of_token=text.document_of_token[:count])
