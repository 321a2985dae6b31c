"""A model folder's tokenizer, and whether two folders number their tokens alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_svd_distill.errors import BadDataError, IncompatiblePairError, MissingInputError


class Tokenizer(Protocol):
    """What packing needs of a tokenizer."""

    @property
    def end_of_text(self) -> int | None:
        """The token that ends a document, or None."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the special tokens the tokenizer puts around a text by itself."""


@dataclass(frozen=True)
class VocabularyComparison:
    """Whether two models number their tokens alike.

    Attributes:
        equal: Every ordinary token has the same number in both, so the two distributions can be compared.
        shared: Numbers 0 … shared-1 mean the same token in both; logits are compared on these.
        reasons: What differs, in words; may be filled although `equal` holds (extra special tokens).
    """

    equal: bool
    shared: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _FastTokenizer:
    inner: Any
    end_of_text: int | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.inner.encode_batch_fast(list(texts))]


@dataclass(frozen=True)
class _AutoTokenizer:
    inner: Any

    @property
    def end_of_text(self) -> int | None:
        return self.inner.eos_token_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self.inner(list(texts), verbose=False)["input_ids"]]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a folder's tokenizer: `tokenizer.json` directly, others through transformers; never run code from it."""
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        inner = _fast(folder)
        inner.no_truncation()
        inner.no_padding()
        return _FastTokenizer(inner, _end_of_text(folder, inner))
    return _AutoTokenizer(_auto(folder))


def vocabularies_match(teacher_folder: str | Path, student_folder: str | Path) -> VocabularyComparison:
    """Compare what each token number means in both models.

    A different padded size of the embedding does not matter, nor do special tokens that one has added at the end.
    """
    teacher, teacher_ordinary = _vocabulary(Path(teacher_folder))
    student, student_ordinary = _vocabulary(Path(student_folder))
    limit = min(max(teacher, default=-1), max(student, default=-1)) + 1
    shared = next((number for number in range(limit) if teacher.get(number) != student.get(number)), limit)
    reasons = []
    if len(teacher) != len(student):
        reasons.append(f"the teacher has {len(teacher)} tokens and the student {len(student)}")
    if shared < max(max(teacher, default=-1), max(student, default=-1)) + 1:
        reasons.append(
            f"token {shared} is {_quoted(teacher.get(shared))} for the teacher "
            f"and {_quoted(student.get(shared))} for the student"
        )
    equal = shared > 0 and all(number < shared for number in teacher_ordinary | student_ordinary)
    return VocabularyComparison(equal, shared, tuple(reasons))


def require_shared_vocabulary(teacher_folder: str | Path, student_folder: str | Path) -> VocabularyComparison:
    """Compare as `vocabularies_match` does, and refuse a pair whose distributions cannot be compared."""
    comparison = vocabularies_match(teacher_folder, student_folder)
    if not comparison.equal:
        raise IncompatiblePairError(
            f"Teacher and student have different vocabularies: {'; '.join(comparison.reasons)}",
            "Choose a pair with the same tokenizer, or use method 'weights', which needs no text",
        )
    return comparison


def _quoted(token: str | None) -> str:
    return "undefined" if token is None else repr(token)


def _vocabulary(folder: Path) -> tuple[dict[int, str], set[int]]:
    """Return number → token, and the numbers of the ordinary tokens (those that are not added ones)."""
    if (folder / "tokenizer.json").is_file():
        inner = _fast(folder)
        by_token, added = inner.get_vocab(with_added_tokens=True), set(inner.get_added_tokens_decoder())
    else:
        slow = _auto(folder)
        by_token, added = slow.get_vocab(), set(slow.added_tokens_decoder)
    by_number = {number: token for token, number in by_token.items()}
    return by_number, set(by_number) - added


def _fast(folder: Path) -> Any:
    from tokenizers import Tokenizer as FastTokenizer

    file = folder / "tokenizer.json"
    try:
        return FastTokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise BadDataError(f"{file} is not a readable tokenizer ({error})", "Fetch the model again") from error


def _auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.model", "vocab.json")):
        raise MissingInputError(
            f"{folder} has no tokenizer (no tokenizer.json)", "Fetch the model with its tokenizer files"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer class meets in damaged files
        raise BadDataError(f"The tokenizer in {folder} cannot be loaded ({error})", "Add a tokenizer.json") from error


def _end_of_text(folder: Path, inner: Any) -> int | None:
    """Find the end-of-text token: named in the tokenizer's settings, or numbered in the model's."""
    named = _json(folder / "tokenizer_config.json").get("eos_token")
    token = named.get("content") if isinstance(named, dict) else named
    number = inner.token_to_id(token) if isinstance(token, str) else None
    if number is None:
        settings = _json(folder / "config.json")
        number = settings.get("eos_token_id", (settings.get("text_config") or {}).get("eos_token_id"))
    if isinstance(number, list):
        number = number[0] if number else None
    return number if isinstance(number, int) else None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
