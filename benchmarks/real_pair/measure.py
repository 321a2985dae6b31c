"""What a row does to held-out text: plain transformers and PEFT, nothing of the product's code.

KL(teacher‖student), cross-entropy and top-1 agreement, over beginnings of documents of 512 tokens at most. Intervals
are 95 % by the bootstrap over groups (packages or pages), all on the same draws, so that what rows share cancels.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.real_pair.places import Places
from benchmarks.real_pair.reading import Piece, dtype_of, final_states, load, pieces
from benchmarks.real_pair.rows import Row, digest_of, file_digest, model_digest, write_json

KINDS = ("heldout", "prose")
_RESAMPLES = 4000
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")

Sums = dict[str, dict[str, float]]
"""Group to sums over its tokens: `kl`, `cross_entropy`, `teacher_cross_entropy`, `agreement`, `tokens`."""


@dataclass(frozen=True)
class MeasureOptions:
    """On what is measured.

    Attributes:
        heldout_tokens: Of code and documents.
        prose_tokens: Of prose, where there is any.
        dtype: Of all models. In bfloat16 logits are rounded by up to 0.06 where they are about 16, which adds to a KL.
    """

    heldout_tokens: int = 16_384
    prose_tokens: int = 8_192
    dtype: str = "float32"

    def tokens(self, kind: str) -> int:
        """Of one kind of text."""
        return {"heldout": self.heldout_tokens, "prose": self.prose_tokens}[kind]


def measure(places: Places, row: Row, options: MeasureOptions) -> dict[str, Any]:
    """Measure a row beside the untouched student, unless that is there."""
    dtype = dtype_of(options.dtype)
    kinds = [kind for kind in KINDS if places.text(kind).is_file()]
    common = {
        "tokens": {kind: options.tokens(kind) for kind in kinds},
        "dtype": str(dtype),
        "text": {kind: file_digest(places.text(kind)) for kind in kinds},
        "teacher": model_digest(places.teacher),
        "student": model_digest(places.student),
    }
    inputs = {**common, "adapter": [file_digest(row.adapter / name) for name in _ADAPTER]}

    def make() -> dict[str, Any]:
        texts = {kind: pieces(places.text(kind), places.student, options.tokens(kind)) for kind in kinds}
        folder = places.root / "measured" / digest_of(common)[:32]
        states, head = _teacher(folder, places.teacher, texts, dtype)
        file = folder / "student.json"
        if not file.is_file():
            student = load(places.student, dtype)
            write_json(file, {kind: sums(student, texts[kind], states[kind], head) for kind in kinds})
            del student
            gc.collect()
        before: dict[str, Sums] = json.loads(file.read_text(encoding="utf-8"))
        adapted = with_adapter(load(places.student, dtype), row.adapter)
        after = {kind: sums(adapted, texts[kind], states[kind], head) for kind in kinds}
        return {"figures": {kind: figures(before[kind], after[kind]) for kind in kinds}, "sums": after}

    return row.section("measured", inputs, make)


def with_adapter(student: Any, adapter: Path) -> Any:
    """The student with an adapter as PEFT loads it, unmerged.

    Raises:
        SystemExit: PEFT would drop a key, or leave a pair as it was.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    model = get_peft_model(student, LoraConfig.from_pretrained(str(adapter)))
    loaded = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    missing = [key for key in loaded.missing_keys if ".lora_" in key or ".modules_to_save." in key]
    if loaded.unexpected_keys or missing:
        raise SystemExit(f"PEFT does not load {adapter} whole: {[*loaded.unexpected_keys, *missing][:3]}")
    return model.eval().requires_grad_(False)


def _teacher(
    folder: Path, teacher: Path, texts: Mapping[str, list[Piece]], dtype: torch.dtype
) -> tuple[dict[str, list[torch.Tensor]], torch.Tensor]:
    """The teacher's final states of each piece and its head, from disk where they are there."""
    file = folder / "teacher.safetensors"
    if not file.is_file():
        model = load(teacher, dtype)
        kept = {
            f"{kind}.{number}": final_states(model, piece.ids[None])[0].contiguous()
            for kind, found in texts.items()
            for number, piece in enumerate(found)
        }
        kept["head"] = model.get_output_embeddings().weight.detach().clone()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(kept, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
        del model, kept
        gc.collect()
    stored = load_file(file)
    states = {kind: [stored[f"{kind}.{number}"] for number in range(len(found))] for kind, found in texts.items()}
    return states, stored["head"]


@torch.no_grad()
def sums(model: Any, found: list[Piece], states: list[torch.Tensor], head: torch.Tensor) -> Sums:
    """Sums over the predicted tokens of each group."""
    total: Sums = {}
    for piece, teacher in zip(found, states, strict=True):
        logits = model(input_ids=piece.ids[None], use_cache=False).logits[0, :-1].float()
        student = torch.log_softmax(logits, -1)
        wanted = torch.log_softmax((teacher[:-1] @ head.T).float()[:, : student.shape[-1]], -1)
        following = piece.ids[1:, None]
        values = {
            "kl": (wanted.exp() * (wanted - student)).sum(-1),
            "cross_entropy": -student.gather(1, following)[:, 0],
            "teacher_cross_entropy": -wanted.gather(1, following)[:, 0],
            "agreement": (student.argmax(-1) == wanted.argmax(-1)).float(),
            "tokens": torch.ones(len(following)),
        }
        group = total.setdefault(piece.group, dict.fromkeys(values, 0.0))
        for name, value in values.items():
            group[name] += float(value.double().sum())
    return total


def figures(before: Sums, after: Sums) -> dict[str, Any]:
    """Figures of both, and the gaps closed in percent with their intervals."""
    groups = sorted(before)
    drawn = np.random.default_rng(0).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=_RESAMPLES)
    ones = np.ones((1, len(groups)))

    def ratio(weights: Any, above: Any, below: Any, unit: float = 1.0) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            return unit * (weights @ above) / (weights @ below)

    def column(which: Sums, name: str) -> Any:
        return np.array([which[group][name] for group in groups])

    tokens, entropy = column(before, "tokens"), column(before, "cross_entropy")
    fractions = {
        "kl": (column(after, "kl"), tokens, 1.0),
        "cross_entropy": (column(after, "cross_entropy"), tokens, 1.0),
        "agreement": (column(after, "agreement"), tokens, 100.0),
        "kl_gap_closed": (column(before, "kl") - column(after, "kl"), column(before, "kl"), 100.0),
        "cross_entropy_gap_closed": (
            entropy - column(after, "cross_entropy"),
            entropy - column(before, "teacher_cross_entropy"),
            100.0,
        ),
        "agreement_gained": (column(after, "agreement") - column(before, "agreement"), tokens, 100.0),
        "student_kl": (column(before, "kl"), tokens, 1.0),
        "student_cross_entropy": (entropy, tokens, 1.0),
        "student_agreement": (column(before, "agreement"), tokens, 100.0),
        "teacher_cross_entropy": (column(before, "teacher_cross_entropy"), tokens, 1.0),
    }
    found: dict[str, Any] = {"groups": len(groups), "tokens": int(tokens.sum())}
    for name, (above, below, unit) in fractions.items():
        low, high = np.percentile(ratio(drawn, above, below, unit), (2.5, 97.5))
        found[name] = {"value": float(ratio(ones, above, below, unit)[0]), "low": float(low), "high": float(high)}
    return found
