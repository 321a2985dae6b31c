"""A small language, a tokenizer that is trained on it, and random models; a pair and its adapter as folders."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.calibration.text import TokenizedText

LENGTH = 64
_WORDS = "red green blue cat dog bird runs sleeps sings fast slowly today and but the a small big".split()  # noqa: SIM905


@dataclass(frozen=True)
class Lab:
    """Folders of a pair, the adapter that makes the student the teacher, and text.

    `random_adapter` is as large as the good one, with random factors.
    """

    teacher: Path
    student: Path
    good_adapter: Path
    random_adapter: Path
    documents: tuple[Document, ...]
    text: TokenizedText


def documents(count: int, seed: int) -> tuple[Document, ...]:
    """Documents of a small language: each word has three words that may follow it."""
    rng = random.Random(0)
    followers = {word: rng.sample(_WORDS, 3) for word in _WORDS}
    rng = random.Random(seed)
    result = []
    for number in range(count):
        words = [rng.choice(_WORDS)]
        for _ in range(rng.randint(60, 140)):
            words.append(rng.choice(followers[words[-1]]))
        result.append(Document(f"document-{number}", " ".join(words)))
    return tuple(result)


def write_tokenizer(folder: Path, texts: list[str], extra: tuple[str, ...] = ()) -> int:
    """Train a small byte-level tokenizer into a folder and return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(extra))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    return int(tokenizer.get_vocab_size())


def llama(vocabulary: int, **changes: Any) -> Any:
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**fields, **changes})).eval()


def qwen3_moe(vocabulary: int, **changes: Any) -> Any:
    """A random Qwen3-MoE."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    fields |= {"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    fields |= {"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(2)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=vocabulary, **{**fields, **changes})).eval()
