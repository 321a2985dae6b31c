"""Whether two models number their tokens alike, and which tokens both have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_svd_distill.calibration.tokenizer import IntArray, auto_tokenizer, backend, model_settings
from moe_svd_distill.errors import IncompatiblePairError

Spelling = Literal["byte-level", "sentencepiece", "other"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


@dataclass(frozen=True)
class VocabularyComparison:
    """Whether two models number their tokens alike.

    Ordinary tokens are those that stand for text: all but special ones.

    Attributes:
        equal: Every token that was not added later has the same number in both, so distributions can be compared.
        shared: Numbers 0 … shared-1 mean the same token in both, and both heads have a row for each; logits are
            compared on these.
        reasons: What differs, in words; may be filled although `equal` holds (extra special tokens).
        teacher_tokens: Ordinary tokens of the teacher.
        student_tokens: Ordinary tokens of the student.
        common: Ordinary tokens that read the same bytes in both, whatever their numbers.
    """

    equal: bool
    shared: int
    reasons: tuple[str, ...]
    teacher_tokens: int
    student_tokens: int
    common: int

    @property
    def overlap(self) -> str:
        """What both have, in words."""
        return (
            f"{self.common} tokens are the same text in both, {_percent(self.common, self.teacher_tokens)} of the "
            f"teacher's and {_percent(self.common, self.student_tokens)} of the student's"
        )


@dataclass(frozen=True)
class Vocabulary:
    """One model's tokens.

    Attributes:
        tokens: Number to token, as its files spell it.
        added: Numbers of tokens added to the trained vocabulary; these are spelled as plain text.
        special: Those of them that stand for no text.
        spelling: How the other tokens are spelled.
        rows: Rows of the model's head, padding included; None if its folder does not say.
    """

    tokens: dict[int, str]
    added: frozenset[int]
    special: frozenset[int]
    spelling: Spelling
    rows: int | None

    @cached_property
    def size(self) -> int:
        """One past the highest number."""
        return max(self.tokens, default=-1) + 1

    @cached_property
    def numbers(self) -> dict[bytes, int]:
        """The bytes an ordinary token reads → its number, as far as the head has a row for it."""
        found: dict[bytes, int] = {}
        last_resort: dict[bytes, int] = {}
        for number, token in sorted(self.tokens.items()):
            if number in self.special or (self.rows is not None and number >= self.rows):
                continue
            if number in self.added or self.spelling == "other":
                found.setdefault(token.encode("utf-8", "surrogatepass"), number)
            elif self.spelling == "byte-level":
                found.setdefault(_byte_level(token), number)
            elif byte := _BYTE_TOKEN.fullmatch(token):
                last_resort[bytes([int(byte[1], 16)])] = number  # "A" reads as the token A, not as <0x41>
            else:
                found.setdefault(token.replace(_SPACE, " ").encode("utf-8", "surrogatepass"), number)
        return {**last_resort, **found}


def compare_vocabularies(teacher_folder: str | Path, student_folder: str | Path) -> VocabularyComparison:
    """Compare what each token number means in both models.

    A different padded size of the head does not matter, nor do special tokens that one has added at the end. A token
    that a head has no row for cannot be compared.
    """
    teacher, student = read_vocabulary(teacher_folder), read_vocabulary(student_folder)
    limit, longest = min(teacher.size, student.size), max(teacher.size, student.size)
    shared = next((n for n in range(limit) if teacher.tokens.get(n) != student.tokens.get(n)), limit)
    reasons = []
    if len(teacher.tokens) != len(student.tokens):
        reasons.append(f"the teacher has {len(teacher.tokens)} tokens and the student {len(student.tokens)}")
    if shared < longest:
        reasons.append(
            f"token {shared} is {_quoted(teacher.tokens.get(shared))} for the teacher "
            f"and {_quoted(student.tokens.get(shared))} for the student"
        )
    for name, vocabulary in (("teacher", teacher), ("student", student)):
        if vocabulary.rows is not None and vocabulary.rows < shared:
            shared = vocabulary.rows
            reasons.append(f"the {name}'s head has {vocabulary.rows} rows for {vocabulary.size} tokens")
    ordinary = (set(teacher.tokens) - teacher.added) | (set(student.tokens) - student.added)
    return VocabularyComparison(
        equal=shared > 0 and all(number < shared for number in ordinary),
        shared=shared,
        reasons=tuple(reasons),
        teacher_tokens=len(teacher.numbers),
        student_tokens=len(student.numbers),
        common=len(teacher.numbers.keys() & student.numbers.keys()),
    )


def require_shared_vocabulary(teacher_folder: str | Path, student_folder: str | Path) -> VocabularyComparison:
    """Compare as `compare_vocabularies` does, and refuse a pair whose distributions cannot be compared by number.

    Raises:
        IncompatiblePairError: The vocabularies differ in more than padding and special tokens.
    """
    comparison = compare_vocabularies(teacher_folder, student_folder)
    if not comparison.equal:
        raise IncompatiblePairError(
            f"Teacher and student have different vocabularies: {'; '.join((*comparison.reasons, comparison.overlap))}",
            "Choose a pair with the same tokenizer, set vocabulary: shared to compare on what both have, "
            "or use method 'weights', which needs no text",
        )
    return comparison


def common_tokens(teacher_folder: str | Path, student_folder: str | Path) -> tuple[IntArray, IntArray]:
    """Rows of the two heads that stand for the same bytes: (student_ids, teacher_ids), (common,) each, by student id.

    Byte-level spellings (`Ġthe`) and SentencePiece ones (`▁the`, `<0x0A>`) are read as the bytes they stand for.
    Special tokens are left out: what ends a text, or a turn, is not the same thing in two models.

    Raises:
        IncompatiblePairError: Nothing is shared, or a tokenizer's spelling does not say which bytes a token is.
    """
    folders = (Path(student_folder), Path(teacher_folder))
    student, teacher = (read_vocabulary(folder) for folder in folders)
    for folder, vocabulary in zip(folders, (student, teacher), strict=True):
        if vocabulary.spelling == "other":
            raise IncompatiblePairError(
                f"The tokenizer in {folder} is neither byte-level nor SentencePiece, so its tokens cannot be compared",
                "Choose a pair with the same tokenizer, or use method 'weights', which needs no text",
            )
    both = sorted((student.numbers[text], teacher.numbers[text]) for text in student.numbers.keys() & teacher.numbers)
    if not both:
        raise IncompatiblePairError(
            f"No token of {folders[0]} is the same text as one of {folders[1]}",
            "Use method 'weights', which needs no text",
        )
    pairs = np.asarray(both, dtype=np.int64)
    return pairs[:, 0].copy(), pairs[:, 1].copy()


def read_vocabulary(folder: str | Path) -> Vocabulary:
    """Read a folder's tokens and how many rows its head has."""
    folder = Path(folder)
    rows = model_settings(folder).get("vocab_size")
    rows = rows if isinstance(rows, int) else None
    if not (folder / "tokenizer.json").is_file():
        inner = auto_tokenizer(folder)
        if getattr(inner, "backend_tokenizer", None) is None:
            by_token, decoder = inner.get_vocab(), inner.added_tokens_decoder
            return _vocabulary(by_token, decoder, "other", rows)
    fast = backend(folder)
    content = json.loads(fast.to_str())
    return _vocabulary(fast.get_vocab(with_added_tokens=True), fast.get_added_tokens_decoder(), _kind(content), rows)


def _vocabulary(by_token: dict[str, int], added: dict[int, Any], spelling: Spelling, rows: int | None) -> Vocabulary:
    special = frozenset(number for number, token in added.items() if token.special)
    return Vocabulary({n: token for token, n in by_token.items()}, frozenset(added), special, spelling, rows)


def _kind(content: Mapping[str, Any]) -> Spelling:
    """Tell from a tokenizer.json how it spells its tokens."""
    parts = json.dumps([content.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    if '"ByteLevel"' in parts:
        return "byte-level"
    marks = '"Metaspace"' in parts or '"ByteFallback"' in parts or _SPACE in parts
    return "sentencepiece" if marks or content.get("model", {}).get("byte_fallback") else "other"


def _byte_level(token: str) -> bytes:
    return b"".join(_BYTES.get(character) or character.encode("utf-8", "surrogatepass") for character in token)


def _byte_of_character() -> dict[str, bytes]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others as the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    spelled = {chr(byte): bytes([byte]) for byte in printable}
    return spelled | {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}


_BYTES = _byte_of_character()


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "none"


def _quoted(token: str | None) -> str:
    return "undefined" if token is None else repr(token)
