"""The lab's one vocabulary: byte-level BPE with 2048 entries, trained on the training split only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lab.corpus import Document
from lab.plan import END_OF_TEXT, VOCABULARY


def train_tokenizer(documents: Iterable[Document]) -> PreTrainedTokenizerFast:
    """Train the vocabulary; `<|endoftext|>` has id 0 and serves as beginning, end and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer saved in a model folder."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document]) -> np.ndarray:
    """Encode documents into one row of tokens, each document preceded by `<|endoftext|>`."""
    backend = tokenizer.backend_tokenizer
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    pieces: list[np.ndarray] = []
    for encoding in backend.encode_batch([document.text for document in documents], add_special_tokens=False):
        pieces.append(np.array([end, *encoding.ids], dtype=np.uint16))
    return np.concatenate(pieces)
