"""Tokenizers as transformers makes them, and words for those that it cannot make."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.calibration.tokenizer import auto_tokenizer, load_tokenizer
from moe_svd_distill.errors import BadDataError, UsageError
from tests.support.tokenizers import byte_level, sentencepiece

TEXTS = ["the cat sat on the mat and the dog sat"] * 4
READ = ["the cat sat", " the cat\n sat  on", "\nthe", "", "<end>the"]


@pytest.mark.parametrize("kind", [sentencepiece, byte_level])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_text_is_the_tokens_that_transformers_makes(tmp_path: Path, kind: Any, name: str) -> None:
    """A tokenizer.json with a Prepend normaliser is not what LlamaTokenizer makes of it."""
    folder = kind(tmp_path / "student", TEXTS, tokenizer_class=name)
    tokenizer, expected = load_tokenizer(folder), auto_tokenizer(folder)(READ)["input_ids"]
    assert tokenizer.encode(READ) == expected
    assert [spans.ids.tolist() for spans in tokenizer.encode_spans(READ)] == expected


def test_a_class_that_transformers_does_not_know_is_read_as_its_file_says(tmp_path: Path) -> None:
    folder = sentencepiece(tmp_path / "student", TEXTS, tokenizer_class="OwnTokenizer")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    plain = sentencepiece(tmp_path / "plain", TEXTS)
    assert load_tokenizer(folder).encode(READ) == load_tokenizer(plain).encode(READ)


def test_a_tokenizer_that_fails_on_text_is_named(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "student", TEXTS, tokenizer_class="GemmaTokenizer")
    with pytest.raises(BadDataError, match=r"The tokenizer in .* cannot read the text"):
        load_tokenizer(folder).encode(READ)


@pytest.mark.parametrize("lacking", [("sentencepiece", "protobuf"), ("protobuf",)])
def test_a_sentencepiece_model_names_the_packages_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: tuple[str, ...]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    known = importlib.util.find_spec

    def found(name: str, *rest: Any) -> Any:
        package = {"google.protobuf": "protobuf"}.get(name, name)
        if package in ("sentencepiece", "protobuf"):
            return None if package in lacking else object()
        return known(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    with pytest.raises(UsageError, match=rf"pip install {' '.join(lacking)}, or add a tokenizer\.json") as refusal:
        load_tokenizer(tmp_path)
    assert "tiktoken" not in str(refusal.value)
