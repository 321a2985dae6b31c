"""The measured documents that `guard.py` draws from: adapters fitted on very little text, block by block.

    python benchmarks/guard_data.py

Fits the lab's dense and independent pairs on 512, 1,024 and 4,096 tokens, whatever the guard thinks of the fit, and
measures every document of the lab's text that none of them has read, at three scales, in blocks of 64 tokens. The
falls of each block are kept as the parabola a·s − c·s² of the scale that fits them best. About an hour on two cores.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs by its path as well

from benchmarks.calibrated import MODELS
from benchmarks.guard import BLOCK_TOKENS, BLOCKS
from moe_svd_distill.algebra.figures import Measurement
from moe_svd_distill.calibration.documents import Document, without
from moe_svd_distill.calibration.reading import read_text
from moe_svd_distill.calibration.text import TokenizedText
from moe_svd_distill.calibration.tokenizer import load_tokenizer
from moe_svd_distill.evaluation.loading import AdaptedStudent, load_model
from moe_svd_distill.evaluation.scale_search import ScaleDecision
from moe_svd_distill.evaluation.sources import measure, record_teacher
from moe_svd_distill.pipeline.distill import distill
from moe_svd_distill.pipeline.lab import lab_folder
from moe_svd_distill.recipe import parse_recipe

PAIRS = ("dense", "independent")
FITS = ((512, 12), (1024, 8), (4096, 3))  # tokens, passes
SCALES = (0.25, 0.5, 1.0)
LENGTH, SEQUENCES_OF_A_DOCUMENT = 256, 4


def main() -> None:
    """Fit, measure, write."""
    lab = lab_folder()
    texts = [str(lab / "text" / f"{name}.jsonl") for name in ("calibration", "heldout")]
    documents: Sequence[Document] = read_text(texts).documents
    with tempfile.TemporaryDirectory() as scratch:
        fitted = {(pair, fit): _fitted(pair, fit, texts[0], Path(scratch)) for pair in PAIRS for fit in FITS}
        for folder in fitted.values():
            record = json.loads((folder / "run.json").read_text())
            documents = without(documents, record["scale_search"]["used_documents"])
        stored: dict[str, NDArray[Any]] = {}
        for pair in PAIRS:
            teacher, student = (lab / "models" / name for name in MODELS[pair])
            text, first = _in_blocks(documents, student)
            stored["first_block"] = first
            record = record_teacher(load_model(teacher), text)
            untouched = measure(load_model(student), record)
            for tokens, passes in FITS:
                adapted = AdaptedStudent.load(load_model(student), fitted[pair, (tokens, passes)])
                measured = list(_at_scales(adapted, record))
                stored[f"{pair}-{tokens}"] = _parabolas(untouched, measured).astype(np.float16)
    save_file(stored, BLOCKS)


def _fitted(pair: str, fit: tuple[int, int], text: str, scratch: Path) -> Path:
    """An adapter, kept at scale 1 whatever it does."""

    def keep(evaluate: object, groups: Sequence[str], **given: object) -> ScaleDecision:
        return ScaleDecision(dict.fromkeys(groups, 1.0), "kept", "Kept without being measured.", ())

    teacher, student = (str(lab_folder() / "models" / name) for name in MODELS[pair])
    values = {"teacher": teacher, "student": student, "output": scratch / f"{pair}-{fit[0]}", "calibration": [text]}
    values |= {"method": "calibrated", "tokens": fit[0], "fit_passes": fit[1], "copies": 0, "rank": 16, "seed": 1}
    with patch("moe_svd_distill.evaluation.scale_search.search_scale", keep):
        return distill(parse_recipe(values | {"scale_search_tokens": 1024})).folder


def _in_blocks(documents: Sequence[Document], student: Path) -> tuple[TokenizedText, NDArray[np.int32]]:
    """The beginnings of documents in sequences of their own, every block a unit; and each document's first block."""
    tokenizer = load_tokenizer(student)
    beginnings = [ids[: SEQUENCES_OF_A_DOCUMENT * LENGTH] for ids in tokenizer.encode([d.text for d in documents])]
    whole = [np.reshape(ids[: len(ids) // LENGTH * LENGTH], (-1, LENGTH)) for ids in beginnings if len(ids) >= LENGTH]
    sequences = np.concatenate(whole)
    blocks = np.arange(sequences.size // BLOCK_TOKENS)
    first = np.cumsum([0, *(part.size // BLOCK_TOKENS for part in whole)])[:-1].astype(np.int32)
    of_token = np.repeat(blocks, BLOCK_TOKENS).reshape(sequences.shape)
    names = tuple(map(str, blocks))
    return TokenizedText(sequences, of_token, sources=names, digests=names), first


def _at_scales(adapted: AdaptedStudent, record: Any) -> Iterator[Measurement]:
    from peft.tuners.lora import LoraLayer

    layers = [module for module in adapted.model.modules() if isinstance(module, LoraLayer)]
    factors = [layer.scaling["default"] for layer in layers]
    for scale in SCALES:
        for layer, factor in zip(layers, factors, strict=True):
            layer.scaling["default"] = scale * factor
        yield measure(adapted.model, record)


def _parabolas(untouched: Measurement, measured: Sequence[Measurement]) -> NDArray[np.float64]:
    """KL untouched and, of KL and of cross-entropy, a and c of the fall a·s − c·s², per token, (blocks, 5)."""
    fit = np.linalg.pinv([[scale, -(scale**2)] for scale in SCALES])
    kl = fit @ np.stack([untouched.kl - after.kl for after in measured])
    entropy = fit @ np.stack([untouched.cross_entropy - after.cross_entropy for after in measured])
    return np.stack([untouched.kl, *kl, *entropy], axis=1) / untouched.tokens[:, None]


if __name__ == "__main__":
    main()
