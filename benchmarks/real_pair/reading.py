"""Documents as tokens, and models as transformers loads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LENGTH = 512


@dataclass(frozen=True)
class Piece:
    """One document's tokens, cut to a sequence's length.

    Attributes:
        ids: Token ids, (tokens,).
        group: Package or page that it comes from.
    """

    ids: torch.Tensor
    group: str


def packed(file: Path, model: Path, tokens: int, length: int = LENGTH) -> torch.Tensor:
    """The first documents of a file end to end with end-of-text tokens between them, (sequences, length).

    Raises:
        SystemExit: The file holds fewer tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for row in _rows(file):
        if len(ids) >= tokens:
            break
        ids += [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
    if tokens < length:
        raise SystemExit(f"{tokens} tokens are less than a sequence, expected at least {length}")
    if len(ids) < tokens:
        raise SystemExit(f"{file} holds {len(ids):,} tokens, expected at least {tokens:,}")
    return torch.tensor(ids[: tokens // length * length]).view(-1, length)


def pieces(file: Path, model: Path, tokens: int, length: int = LENGTH) -> list[Piece]:
    """The beginnings of the first documents of a file, one sequence each, until they have so many tokens.

    Raises:
        SystemExit: The file holds fewer tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found: list[Piece] = []
    left = tokens
    for row in _rows(file):
        ids = tokenizer(row["text"])["input_ids"][: min(length, left)]
        if len(ids) > 1:
            found.append(Piece(torch.tensor(ids), row["group"]))
            left -= len(ids)
        if left < 2:
            return found
    raise SystemExit(f"{file} holds {tokens - left:,} tokens in beginnings of {length}, expected {tokens:,}")


def load(folder: Path, dtype: torch.dtype) -> Any:
    """A model as transformers loads it; nothing is fetched and no code of its folder is run."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def final_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the head reads: (sequences, length, hidden)."""
    output = model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    return output.hidden_states[-1]


def dtype_of(name: str) -> torch.dtype:
    """A type by its name; `auto` is bfloat16 where the CPU or a GPU multiplies it fast.

    Raises:
        SystemExit: It is no type.
    """
    if name == "auto":
        fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise SystemExit(f"--dtype {name}: expected auto, float32 or bfloat16")
    return found


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        raise SystemExit(f"{file} is not there; run the step text first")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
