"""A model folder's tokenizer: token ids, what characters each token reads, and conversations as text."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_svd_distill.calibration.chat import Chat, render_chat
from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError, UsageError

IntArray: TypeAlias = NDArray[np.int64]

_SENTENCEPIECE = b"\n"  # what its protobuf begins with


@dataclass(frozen=True)
class TokenSpans:
    """One text's tokens and the characters they stand for.

    Attributes:
        ids: Token ids, (tokens,), with the special tokens the tokenizer puts around a text by itself.
        begin: First character of each token in the text, (tokens,).
        end: One past its last, (tokens,). Where a character takes several tokens each of them spans all of it.
        read: Whether the token stands for text, (tokens,); not so for those put around it.
    """

    ids: IntArray
    begin: IntArray
    end: IntArray
    read: NDArray[np.bool_]


class Tokenizer:
    """The tokenizer that transformers makes of a folder; `tokenizer.json` as it stands where it makes none.

    Attributes:
        end_of_text: The token that ends a document, or None.
    """

    end_of_text: int | None

    def __init__(self, folder: Path) -> None:
        """Load it, as `load_tokenizer` says."""
        self._folder, self._fast = folder, _as_transformers_reads(folder)
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
            self.end_of_text = _end_of_text(folder, self._fast)
        else:
            self.end_of_text = self._transformers.eos_token_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the special tokens the tokenizer puts around a text by itself."""
        try:
            if self._fast is not None:
                return [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts))]
            return [list(ids) for ids in self._transformers(list(texts), verbose=False)["input_ids"]]
        except Exception as error:  # the libraries raise whatever they meet
            raise self._failed(error) from error

    def encode_spans(self, texts: Sequence[str]) -> list[TokenSpans]:
        """The same tokens with the characters each of them reads."""
        try:
            encodings = self._exact.encode_batch(list(texts))
        except DistillError:
            raise
        except Exception as error:  # as above
            raise self._failed(error) from error
        result = []
        for encoding in encodings:
            offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            read = np.asarray(encoding.special_tokens_mask, dtype=np.int64) == 0
            result.append(TokenSpans(np.asarray(encoding.ids, dtype=np.int64), offsets[:, 0], offsets[:, 1], read))
        return result

    def render(self, chat: Chat, where: str) -> str:
        """The text that the chat template makes of a conversation; `where` names the record in errors."""
        begins = self.encode([""])[0][:1] == [self._transformers.bos_token_id]
        return render_chat(chat, self._transformers, where=where, begins=begins)

    @cached_property
    def _exact(self) -> Any:
        return _with_exact_offsets(backend(self._folder) if self._fast is None else self._fast)

    def _failed(self, error: Exception) -> BadDataError:
        return BadDataError(
            f"The tokenizer in {self._folder} cannot read the text ({error})", "Fetch the tokenizer's files again"
        )

    @cached_property
    def _transformers(self) -> Any:
        return auto_tokenizer(self._folder)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a folder's tokenizer as transformers does; never run code from it.

    A class such as LlamaTokenizer builds its own steps in place of those in tokenizer.json, and an adapter meets what
    transformers makes. Where transformers knows no class, tokenizer.json is read as it stands.

    Raises:
        MissingInputError: The folder has no tokenizer.
        BadDataError: Its files are damaged.
    """
    return Tokenizer(Path(folder))


def backend(folder: Path) -> Any:
    """Return a folder's `tokenizers.Tokenizer`.

    Raises:
        BadDataError: There is none, because the tokenizer is of a kind that does not say what its tokens read.
    """
    if (folder / "tokenizer.json").is_file():
        return _fast(folder)
    inner = getattr(auto_tokenizer(folder), "backend_tokenizer", None)
    if inner is None:
        raise BadDataError(
            f"The tokenizer in {folder} does not say which characters a token reads", "Add a tokenizer.json"
        )
    return inner


def auto_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer through transformers."""
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in files):
        raise MissingInputError(
            f"{folder} has no tokenizer (no tokenizer.json)", "Fetch the model with its tokenizer files"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer class meets in damaged files
        missing = _missing_packages(folder)
        if missing:
            raise UsageError(
                f"The tokenizer in {folder} has no tokenizer.json, and to read its tokenizer.model "
                f"{' and '.join(missing)} must be installed",
                f"Install it with: pip install {' '.join(missing)}, or add a tokenizer.json",
            ) from error
        raise BadDataError(f"The tokenizer in {folder} cannot be loaded ({error})", "Add a tokenizer.json") from error


def _missing_packages(folder: Path) -> list[str]:
    """What a SentencePiece model without a fast file lacks; transformers asks for tiktoken then, which is no help."""
    file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not file.is_file():
        return []
    with file.open("rb") as stream:
        if stream.read(1) != _SENTENCEPIECE:
            return []
    return [name for name, module in (("sentencepiece",) * 2, ("protobuf", "google.protobuf")) if not _there(module)]


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _as_transformers_reads(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` within what transformers makes; None if there is none."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        inner = getattr(auto_tokenizer(folder), "backend_tokenizer", None)
    except BadDataError:  # an unknown class, or damaged, which is said now
        return _fast(folder)
    return _fast(folder) if inner is None else inner


def model_settings(folder: Path) -> Mapping[str, Any]:
    """The folder's config.json, the part on text where there are several; empty without one."""
    settings = _json(folder / "config.json")
    return {**settings, **(settings.get("text_config") or {})}


def _with_exact_offsets(inner: Any) -> Any:
    """Copy a tokenizer so that offsets hold the white space a token reads, which most leave out (`trim_offsets`)."""
    from tokenizers import Tokenizer as FastTokenizer

    def untrimmed(value: Any) -> Any:
        if isinstance(value, list):
            return [untrimmed(item) for item in value]
        if isinstance(value, dict):
            return {key: False if key == "trim_offsets" else untrimmed(item) for key, item in value.items()}
        return value

    content = json.loads(inner.to_str())
    for part in ("pre_tokenizer", "post_processor"):
        content[part] = untrimmed(content.get(part))
    content["truncation"] = content["padding"] = None
    return FastTokenizer.from_str(json.dumps(content))


def _fast(folder: Path) -> Any:
    from tokenizers import Tokenizer as FastTokenizer

    file = folder / "tokenizer.json"
    try:
        return FastTokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise BadDataError(f"{file} is not a readable tokenizer ({error})", "Fetch the model again") from error


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


def _json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
