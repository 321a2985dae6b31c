"""Whether a row's adapter is what others can open: verify, transformers, PEFT merged and unmerged, and `merge`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_pair.measure import with_adapter
from benchmarks.real_pair.places import Places
from benchmarks.real_pair.reading import load, pieces
from benchmarks.real_pair.rows import Row, file_digest, model_digest

_TOKENS = 256


def opens(places: Places, row: Row) -> dict[str, Any]:
    """Check a row's adapter, unless that is done: differences of logits, and KL, on held-out text in float32."""
    inputs = {
        "student": model_digest(places.student),
        "adapter": file_digest(row.adapter / "adapter_model.safetensors"),
        "tokens": _TOKENS,
    }

    def make() -> dict[str, Any]:
        _command("verify", str(row.adapter), "--student", str(places.student))
        texts = [piece.ids[None] for piece in pieces(places.text("heldout"), places.student, _TOKENS)]
        model = with_adapter(load(places.student, torch.float32), row.adapter)
        plain = _logits(model, texts)
        found = {"peft_merged": _difference(plain, _logits(model.merge_and_unload(), texts))}
        model = load(places.student, torch.float32)
        model.load_adapter(str(row.adapter))
        found["transformers"] = _difference(plain, _logits(model, texts))
        with tempfile.TemporaryDirectory(dir=row.folder) as folder:
            merged = Path(folder) / "merged"
            _command("merge", str(row.adapter), str(merged), "--student", str(places.student))
            found["merged_as_stored"] = _difference(plain, _logits(load(merged, torch.float32), texts))
        return found

    return row.section("opens", inputs, make)


def _command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "moe_svd_distill", *words], check=True, stdout=subprocess.DEVNULL)


@torch.no_grad()
def _logits(model: Any, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(input_ids=ids, use_cache=False).logits[0].float() for ids in texts]


def _difference(plain: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
    """The largest difference of a logit, and the mean KL in nats."""
    largest, divergence, count = 0.0, 0.0, 0
    for before, after in zip(plain, other, strict=True):
        largest = max(largest, float((before - after).abs().max()))
        wanted, found = torch.log_softmax(before, -1), torch.log_softmax(after, -1)
        divergence += float((wanted.exp() * (wanted - found)).sum(-1).double().sum())
        count += len(before)
    return {"largest_difference_of_a_logit": largest, "kl": divergence / count}
