"""A tiny pair where the truth is known: the teacher is the student plus an adapter that was trained on the text."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.calibration.text import TokenizedText, tokenize
from moe_svd_distill.calibration.tokenizer import load_tokenizer

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


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Train the adapter for a few steps, and merge it into a copy of the student to be the teacher."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("lab")
    texts = documents(60, seed=3)
    size = write_tokenizer(folder / "student", [document.text for document in texts])
    student = llama(size)
    student.save_pretrained(folder / "student")
    text = tokenize(texts, load_tokenizer(folder / "student"), length=LENGTH)

    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj", "lm_head"])
    model = get_peft_model(student, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = torch.from_numpy(text.sequences)
    for step in range(30):
        rows = torch.arange(step * 16, step * 16 + 16) % len(batches)
        loss = model(input_ids=batches[rows], labels=batches[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder / "good", save_embedding_layers=False)
    _write_random(model, folder / "random")
    teacher = model.merge_and_unload()
    teacher.save_pretrained(folder / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "student" / name, folder / "teacher" / name)
    return Lab(folder / "teacher", folder / "student", folder / "good", folder / "random", texts, text)


def _write_random(model: Any, folder: Path) -> None:
    """Save factors of the same norms with random directions, and leave the model as it was."""
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name in kept:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * kept[name].norm() / noise.norm()
    model.save_pretrained(folder, save_embedding_layers=False)
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]


@pytest.fixture
def rng() -> np.random.Generator:
    """Reproducible noise."""
    return np.random.default_rng(7)
