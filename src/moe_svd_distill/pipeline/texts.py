"""The calibration text of a run, divided and tokenised for both models, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.pipeline.pair import ModelPair
from moe_svd_distill.recipe import Recipe, text_sources

if TYPE_CHECKING:
    from moe_svd_distill.calibration.paired import PairedText
    from moe_svd_distill.calibration.text import Division

LONGEST_SEQUENCE = 512
MUCH_REPEATED = 0.05
"""More repeated blocks than this share of the words are worth a note."""
MUCH_LESS = 0.02
"""Of the tokens of a part; a source that gives so much less than its share is worth a note."""
FEWEST_VALIDATION_TOKENS, MOST_VALIDATION_TOKENS = 1024, 4096


@dataclass(frozen=True)
class RunText:
    """What a run reads.

    Attributes:
        search: Text the scale is searched on, which nothing else is chosen by.
        fit: Text that is fitted or trained on; None where only the weights stage runs.
        validation: Text that passes, steps and the head's rank are chosen by; with `fit`, all that a fit depends on.
        counts: Of what was read, see `ReadText`.
        notes: What people should know of that, and of the tokenizers.
    """

    search: PairedText
    fit: PairedText | None
    validation: PairedText | None
    counts: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def parts(self) -> Mapping[str, PairedText]:
        """By the name they have in run.json."""
        found = {"search": self.search, "fit": self.fit, "check": self.validation}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def used_documents(self) -> list[str]:
        """Digests of everything read, which an evaluation has to leave out."""
        return sorted({digest for part in self.parts.values() for digest in part.student.digests})

    @property
    def used_groups(self) -> list[str]:
        """Digests of the sources of everything read, whose other documents an evaluation has to leave out too."""
        return sorted({digest for part in self.parts.values() for digest in part.student.groups})

    @property
    def division(self) -> Division | None:
        """How far the parts are apart; None without a second part."""
        return self.search.student.division if self.fit is not None else None

    def record(self) -> dict[str, object]:
        """For run.json: the parts, how far they are apart, and what people should know."""
        division = self.division
        found = {} if division is None else {"division": _division_record(division)}
        parts = {name: _part_record(part) for name, part in self.parts.items()}
        return {"read": dict(self.counts), "text": parts, **found, "shortfalls": self.shortfalls()}

    def shortfalls(self) -> list[str]:
        """What was left out, and what was asked for and could not be had, in words."""
        read = [f"calibration text: {note}" for note in self.notes]
        short = [
            f"{name} text: {part.student.tokens:,} tokens instead of the {part.student.asked:,} asked for; the "
            "calibration text has no more"
            for name, part in self.parts.items()
            if part.student.short
        ]
        for name, part in self.parts.items():
            for portion, tokens in part.student.tokens_by_portion().items():
                wanted = int(portion.share * (part.student.asked or 0))
                if tokens < wanted - MUCH_LESS * (part.student.asked or 0) - part.student.length:
                    short.append(f"{name} text: {tokens:,} tokens of {portion.name} instead of {wanted:,}")
        return read + short + ([] if self.division is None else _division_notes(self.division))


@dataclass(frozen=True)
class TextSize:
    """How much text training has: of text that was read, or as the recipe lets expect.

    Attributes:
        tokens: To train on, given.
        sequences: Of these.
        length: Tokens of a sequence.
        check: Tokens measured on meanwhile.
        identical: Whether both models read the same tokens.
        rows: Of the head: tokens that both models have.
    """

    tokens: int
    sequences: int
    length: int
    check: int
    identical: bool
    rows: int

    @classmethod
    def of(cls, text: RunText) -> TextSize:
        """Of a text with a part to train on."""
        fit, check = text.fit, text.validation
        assert fit is not None
        assert check is not None
        student = fit.student
        count, rows = len(student.sequences), len(fit.student_ids)
        return cls(student.tokens, count, student.length, check.student.tokens, fit.identical, rows)


def _part_record(part: PairedText) -> dict[str, object]:
    student, found = part.student, part.student.tokens_by_portion()
    return {
        "tokens_asked": student.asked,
        "tokens": student.tokens,
        "documents": len(student.sources),
        "groups": len(student.groups),
        "sequence_length": student.length,
        "documents_skipped": student.skipped,
        "places_compared": round(part.aligned, 4),
        "common_tokens": len(part.student_ids),
        **({"tokens_by_source": {portion.name: tokens for portion, tokens in found.items()}} if found else {}),
    }


def _division_record(division: Division) -> dict[str, object]:
    return {
        "divided_by": "group" if division.apart else "document",
        "duplicated_share": round(division.removed, 4),
        "documents_left_out_as_duplicates": division.left_out,
    }


def _division_notes(division: Division) -> list[str]:
    notes = []
    if not division.apart:
        notes.append(
            "search text: from the same sources as the text fitted on, because the calibration text has too few; the "
            "gain shown may be larger than on other sources; give text of several sources, or name theirs in a field "
            "(text_group)"
        )
    if division.removed > MUCH_REPEATED:
        left_out = f", and left out {division.left_out:,} documents whole" if division.left_out else ""
        notes.append(
            f"calibration text: {division.removed:.0%} of its words were removed as blocks that other documents hold "
            f"too{left_out}"
        )
    return notes


def read_run_text(recipe: Recipe, pair: ModelPair, stages: Sequence[str]) -> RunText:
    """Read, divide and tokenise the calibration text for a run with these stages.

    Raises:
        MissingInputError: A text is not there.
        BadDataError: There is too little text, or no record has the field that is to name its source.
        IncompatiblePairError: The models have different vocabularies, and the recipe does not say ``shared``.
    """
    from moe_svd_distill.calibration.paired import PairTokenizers
    from moe_svd_distill.calibration.sources import read_sources

    read = read_sources(
        text_sources(recipe.calibration),
        field=recipe.text_field,
        group_field=recipe.text_group,
        tokens=max(recipe.tokens, recipe.scale_search_tokens),
    )
    documents = read.documents
    if recipe.text_group is not None and all(document.group is None for document in documents):
        raise BadDataError(
            f"No record of the calibration text names its source in the field {recipe.text_group!r} (text_group)",
            "Name the field that does, or leave text_group out",
        )
    fitting = "calibrated" in stages or "refined" in stages
    budgets = {"validation": validation_tokens(recipe), "fit": recipe.tokens} if fitting else {}
    budgets["search"] = recipe.scale_search_tokens  # last: more of it leaves the fit as it is
    folders = pair.teacher.checkpoint.folder, pair.student.checkpoint.folder
    length = sequence_length(recipe, longest_sequence(pair))
    parts = PairTokenizers(*folders, recipe.vocabulary).parts(documents, budgets, length=length, seed=recipe.seed)
    notes = read.notes + pair.tokenizer_notes
    return RunText(parts["search"], parts.get("fit"), parts.get("validation"), read.counts, notes)


def needs_text(recipe: Recipe, stages: Sequence[str]) -> bool:
    """Whether a run with these stages reads text: to train on, or to search the scale on."""
    fitting = "calibrated" in stages or "refined" in stages
    return fitting or (bool(recipe.calibration) and recipe.scale_search)


def refuse_missing_text(recipe: Recipe) -> None:
    """Refuse a run whose text is not there before a model is downloaded.

    Raises:
        MissingInputError: A text is not there.
    """
    from moe_svd_distill.calibration.reading import refuse_missing

    refuse_missing([source.path for source in text_sources(recipe.calibration)])


def validation_tokens(recipe: Recipe) -> int:
    """Tokens that passes, steps and ranks are chosen by: a quarter of what is fitted on, within bounds."""
    return min(max(recipe.tokens // 4, FEWEST_VALIDATION_TOKENS), MOST_VALIDATION_TOKENS)


def longest_sequence(pair: ModelPair) -> int:
    """The longest sequence both models take, at most 512 tokens."""
    models: tuple[Any, Any] = (pair.teacher.checkpoint.config, pair.student.checkpoint.config)
    limits = (config.get("max_position_embeddings") for config in models)
    return min([LONGEST_SEQUENCE, *(int(limit) for limit in limits if limit)])


def sequence_length(recipe: Recipe, longest: int) -> int:
    """Tokens of a sequence, for what both models take and is usual at most.

    Shorter ones learn faster for a while and then spoil what lies beyond them (docs/decisions/0019).
    """
    return longest if recipe.sequence_tokens == "auto" else min(longest, recipe.sequence_tokens)


def expected_text(recipe: Recipe, pair: ModelPair, tokens: int) -> TextSize:
    """So much text to train on, and the text to check by, before it is read."""
    from moe_svd_distill.calibration.text import whole

    length = sequence_length(recipe, longest_sequence(pair))
    tokens, check = whole(tokens, length), whole(validation_tokens(recipe), length)
    rows = pair.student.layout.geometry.vocabulary
    return TextSize(tokens, tokens // length, length, check, recipe.vocabulary == "equal", rows)
