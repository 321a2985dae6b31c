"""A plain PEFT LoRA: AdamW to the teacher's full distributions, the best pass on other text kept.

    python -m benchmarks.real_pair.lora OPTIONS.json

One run by itself, so that what it takes can be measured from outside; `lora_row` starts it. It uses nothing of the
product.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_pair.cost import run_measured
from benchmarks.real_pair.places import Places
from benchmarks.real_pair.reading import dtype_of, final_states, load, packed
from benchmarks.real_pair.rows import Row, file_digest, model_digest, write_json

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WARMUP, _CLIP = 0.02, 1.0


@dataclass(frozen=True)
class LoraOptions:
    """How it is trained.

    Attributes:
        tokens: Of the training text.
        rate: Largest learning rate; it falls linearly to zero.
        epochs: Passes at most.
        seed: Of the factors and the order of sequences.
        dtype: Of the student and the teacher's head; the factors are float32, as PEFT makes them.
        rank: Of every pair; lora_alpha is the same.
        step_sequences: Sequences of 512 tokens in a step.
        validation_tokens: Tokens of calibration text that passes are compared on.
    """

    tokens: int
    rate: float
    epochs: int
    seed: int
    dtype: str = "float32"
    rank: int = 64
    step_sequences: int = 1
    validation_tokens: int = 4096

    @property
    def name(self) -> str:
        """Of its row."""
        parts = ["lora", str(self.tokens), f"r{self.rate:g}", f"e{self.epochs}", f"s{self.seed}"]
        return "-".join(parts + ([] if self.dtype == "float32" else [self.dtype]))


def lora_row(places: Places, options: LoraOptions, name: str | None = None) -> Row:
    """Train one, unless its row is there."""
    row = Row(places.rows / (name or options.name))
    inputs = {
        "kind": "lora",
        "options": asdict(options),
        "student_folder": places.student.name,
        "student": model_digest(places.student),
        "teacher": model_digest(places.teacher),
        "text": [file_digest(places.text(part)) for part in ("train", "calibration")],
    }

    def make() -> dict[str, Any]:
        file = row.folder / "options.json"
        wanted = {
            "options": asdict(options),
            "student": str(places.student),
            "teacher": str(places.teacher),
            "train": str(places.text("train")),
            "validation": str(places.text("calibration")),
            "adapter": str(row.adapter),
        }
        write_json(file, wanted)
        cost = run_measured([sys.executable, "-m", "benchmarks.real_pair.lora", str(file)], row.folder / "log.txt")
        curve = json.loads((row.adapter / "curve.json").read_text(encoding="utf-8"))
        return {"cost": cost, "curve": curve}

    row.section("row", inputs, make)
    return row


@dataclass(frozen=True)
class Taught:
    """Text with the teacher's final states.

    Attributes:
        ids: (sequences, length).
        states: (sequences, length, hidden).
    """

    ids: Tensor
    states: Tensor


def train(
    student: Any, head: Tensor, text: Taught, validation: Taught, options: LoraOptions, adapter: Path
) -> list[dict[str, float]]:
    """Train the factors and save those of the pass that is best on the validation text.

    Args:
        student: A causal language model.
        head: The teacher's, (vocabulary, hidden).
        text: To train on.
        validation: To choose the pass on.
        options: How.
        adapter: Folder to save to.

    Returns:
        KL on the validation text, in nats per token, before and after each pass, with the training loss.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(options.seed)
    config = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    model = get_peft_model(student, config)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=options.rate, weight_decay=0.0)
    steps = options.epochs * math.ceil(len(text.ids) / options.step_sequences)
    order = torch.Generator().manual_seed(options.seed)
    curve = [{"epoch": 0, "kl": _mean_kl(model, head, validation)}]
    model.save_pretrained(adapter)
    step = 0
    for epoch in range(1, options.epochs + 1):
        model.train()
        losses = []
        for rows in torch.randperm(len(text.ids), generator=order).split(options.step_sequences):
            for row in rows:
                loss = kl(model, head, text.ids[row : row + 1], text.states[row : row + 1]) / len(rows)
                loss.backward()
                losses.append(loss.item() * len(rows))
            torch.nn.utils.clip_grad_norm_(factors, _CLIP)
            for group in optimizer.param_groups:
                group["lr"] = options.rate * _factor(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        curve.append({"epoch": epoch, "kl": _mean_kl(model, head, validation), "loss": sum(losses) / len(losses)})
        print(curve[-1], flush=True)
        if curve[-1]["kl"] == min(point["kl"] for point in curve):
            model.save_pretrained(adapter)
    return curve


def kl(model: Any, head: Tensor, ids: Tensor, states: Tensor) -> Tensor:
    """Mean forward KL(teacher‖student) over all places, full vocabulary, in nats."""
    logits = model(input_ids=ids, use_cache=False).logits.float()
    with torch.no_grad():
        target = torch.log_softmax((states @ head.T).float()[..., : logits.shape[-1]], -1)
    return torch.nn.functional.kl_div(
        torch.log_softmax(logits, -1).flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean"
    )


def _factor(step: int, steps: int) -> float:
    warm = max(1, math.ceil(_WARMUP * steps))
    return min(1.0, (step + 1) / warm) * (1 - step / steps)


@torch.no_grad()
def _mean_kl(model: Any, head: Tensor, text: Taught) -> float:
    model.eval()
    found = [kl(model, head, text.ids[n : n + 1], text.states[n : n + 1]).item() for n in range(len(text.ids))]
    return sum(found) / len(found)


def main() -> None:
    """Train as a file of options says."""
    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    options = LoraOptions(**wanted["options"])
    student, fast = Path(wanted["student"]), dtype_of("auto")
    texts = [
        packed(Path(wanted[part]), student, tokens)
        for part, tokens in (("train", options.tokens), ("validation", options.validation_tokens))
    ]
    teacher = load(Path(wanted["teacher"]), fast)
    dtype = dtype_of(options.dtype)
    taught = [
        Taught(ids, torch.cat([final_states(teacher, ids[n : n + 1]) for n in range(len(ids))]).to(dtype))
        for ids in texts
    ]
    head = teacher.get_output_embeddings().weight.detach().to(dtype, copy=True)
    del teacher
    gc.collect()
    model = load(student, dtype)
    curve = train(model, head, *taught, options, Path(wanted["adapter"]))
    write_json(Path(wanted["adapter"]) / "curve.json", curve)


if __name__ == "__main__":
    main()
