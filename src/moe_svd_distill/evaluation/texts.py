"""The texts of an evaluation as both models read them: what is measured, and what a temperature is fitted on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from moe_svd_distill.calibration.paired import PairedText, VocabularyMode, pair_text
from moe_svd_distill.calibration.text import (
    Document,
    compare_vocabularies,
    load_tokenizer,
    require_shared_vocabulary,
    split_documents,
    tokenize,
    without,
)
from moe_svd_distill.errors import BadDataError

FIT_TOKENS = 4_096  # of calibration text for one temperature, which is one number


def evaluation_texts(
    documents: Sequence[Document],
    calibration: Sequence[Document],
    used: Collection[str],
    teacher_folder: str | Path,
    student_folder: str | Path,
    *,
    limit_tokens: int | None,
    length: int,
    seed: int,
    mode: VocabularyMode,
) -> list[PairedText]:
    """The held-out text, and after it the text to fit a temperature on if there is enough of it.

    Args:
        documents: To measure on; read in an order drawn from the seed up to the limit.
        calibration: To fit the temperature on; what is measured on is left out.
        used: Digests of documents that are left out.
        teacher_folder: The teacher with its tokenizer.
        student_folder: The student with its tokenizer.
        limit_tokens: Student tokens to measure on at most.
        length: Tokens of a sequence.
        seed: Of the order of documents.
        mode: Whether the models must number their tokens alike.

    Raises:
        IncompatiblePairError: The vocabularies differ in mode `equal`, or have nothing in common.
        BadDataError: No text is left.
    """
    compare = require_shared_vocabulary if mode == "equal" else compare_vocabularies
    comparison = compare(teacher_folder, student_folder)
    fresh = without(documents, used)
    if not fresh:
        raise BadDataError("All of the text was used to make the adapter", "Name text the adapter has not seen")
    tokenizer = load_tokenizer(student_folder)

    def read(chosen: Sequence[Document], limit: int | None) -> PairedText:
        if comparison.equal:
            text = tokenize(chosen, tokenizer, limit, length=length, vocabulary=comparison.shared)
            return PairedText.read_alike(text, comparison.shared)
        # No text has more tokens than bytes, the one that ends a document and the one that begins it included.
        everything = sum(len(document.text.encode("utf-8", "surrogatepass")) + 2 for document in chosen)
        budget = {"held-out": everything if limit is None else limit}
        return pair_text(chosen, teacher_folder, student_folder, budget, length=length, mode="shared", seed=seed)[
            "held-out"
        ]

    ordered = split_documents(fresh, {"held-out": 1.0}, seed)["held-out"]
    texts = [read(ordered, limit_tokens)]
    others = without(calibration, texts[0].student.digests)
    with suppress(BadDataError):  # less than a sequence of it: then half of the text itself is what T is fitted on
        texts.append(read(others, FIT_TOKENS))
    return texts
