"""The lab's text, and tokenizers of several kinds trained on parts of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import normalizers

from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.calibration.reading import read_text
from tests.support.tokenizers import byte_level, sentencepiece

LAB_TEXT = Path(__file__).parents[2] / "lab" / "text" / "calibration.jsonl"


@dataclass(frozen=True)
class Kinds:
    """Folders with tokenizers: two byte-level ones of different sizes, one that composes characters, one of bytes and
    `▁`."""

    small: Path
    large: Path
    composing: Path
    pieces: Path


@pytest.fixture(scope="session")
def lab_documents() -> tuple[Document, ...]:
    """Documentation and source files."""
    return tuple(Document(d.source, d.text[:3500]) for d in read_text([LAB_TEXT]).documents)


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory, lab_documents: tuple[Document, ...]) -> Kinds:
    """Trained on different halves of the lab's text."""
    folder = tmp_path_factory.mktemp("kinds")
    texts = [document.text for document in lab_documents]
    return Kinds(
        small=byte_level(folder / "small", texts[::4], 600),
        large=byte_level(folder / "large", texts[1::4], 1500),
        composing=byte_level(folder / "composing", texts[::4], 600, normalizer=normalizers.NFC()),
        pieces=sentencepiece(folder / "pieces", texts[2::4], 1200),
    )
