"""The small files of a model folder for a GGUF file: its configuration, its tokenizer and its chat template.

They are made once in a process, by transformers from the file's metadata, in a temporary folder that goes with the
process. What reads a tokenizer or a configuration from a folder then needs to know nothing of GGUF.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import BadDataError, reason_of, shown

_BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_UNUSED = 5
_PLAIN_SPLITS = ("gpt-2",)
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Of these a word that is a token as a whole is never taken apart (`ignore_merges`)."""

_made: dict[tuple[Path, str], Path] = {}
_from_beside: dict[Path, str] = {}
"""Folder to why its tokenizer is the one that lies beside the file."""


def model_folder(file: Path, digest: str, config: Mapping[str, object]) -> Path:
    """The folder of a file whose header has this digest.

    Raises:
        BadDataError: transformers cannot make the tokenizer, and no tokenizer.json lies beside the file.
    """
    known = _made.get((file, digest))
    if known is not None and known.is_dir():
        return known
    folder = Path(tempfile.mkdtemp(prefix="moe-svd-distill-"))
    atexit.register(_remove, folder, os.getpid())
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    rows = config["vocab_size"]
    assert isinstance(rows, int)
    _write_tokenizer(file, folder, rows)
    _made[file, digest] = folder
    return folder


def file_behind(folder: Path) -> Path | None:
    """The file that a folder was made for, if it was."""
    return next((file for (file, _), made in _made.items() if made == folder), None)


def why_from_beside(folder: Path) -> str | None:
    """Why transformers makes no tokenizer of the file behind a folder, so that it is the one that lies beside it."""
    return _from_beside.get(folder)


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _write_tokenizer(file: Path, folder: Path, rows: int) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    try:
        architecture, parts, settings = get_gguf_tokenizer(str(file))
        _refuse_unknown_split(parts)
        _leave_out_padding(parts)
        made, _ = convert_gguf_tokenizer(architecture, parts)
        whole_words = parts.get("pre_tokenizer_type") in _WHOLE_WORDS
        inner = Tokenizer.from_str(_of_the_file(made.to_str(), parts["tokens"], whole_words))
        if whole_words:
            settings.setdefault("add_bos_token", True)
        if inner.get_vocab_size() > rows:
            raise ValueError(f"it has {inner.get_vocab_size()} tokens, the model {rows}")
        PreTrainedTokenizerFast(tokenizer_object=inner, **settings).save_pretrained(str(folder))
    except Exception as error:  # whatever transformers meets in metadata it does not know
        found = [file.parent / name for name in _BESIDE if (file.parent / name).is_file()]
        reason = reason_of(error)
        if not any(path.name == "tokenizer.json" for path in found):
            raise BadDataError(
                f"transformers makes no tokenizer of {shown(file)}: {reason}",
                "Put the tokenizer.json and tokenizer_config.json of the original model beside the file",
            ) from error
        for path in found:
            shutil.copyfile(path, folder / path.name)
        _from_beside[folder] = reason


def _of_the_file(tokenizer: str, tokens: Sequence[str], whole_words: bool) -> str:
    """A tokenizer.json without the tokens of its class that the file does not have."""
    content = json.loads(tokenizer)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < len(tokens)]
    if content["model"].get("unk_token") not in tokens:
        content["model"]["unk_token"] = None
    if whole_words:
        content["model"]["ignore_merges"] = True
    return json.dumps(content)


def _refuse_unknown_split(parts: Mapping[str, object]) -> None:
    """transformers cuts words GPT-2's way where it does not know how the vocabulary's merges were learned."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    known = (*GGUF_PRE_TOKENIZER_SPLITS, *_PLAIN_SPLITS)
    found = parts.get("pre_tokenizer_type")
    if parts.get("tokenizer_type") == "gpt2" and found not in known:
        raise ValueError(f"it does not know how {found!r} cuts text (tokenizer.ggml.pre)")


def _leave_out_padding(parts: dict[str, Any]) -> None:
    """Names that llama.cpp gave to rows without a token, at the vocabulary's end."""
    tokens, kinds = list(parts["tokens"]), parts.get("token_type") or []
    end = len(tokens)
    while end and len(kinds) == len(tokens) and kinds[end - 1] == _UNUSED:
        end -= 1
    for name in ("tokens", "token_type", "scores"):
        if name in parts:
            parts[name] = parts[name][:end]
