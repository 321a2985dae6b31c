"""TRL's DistillationTrainer, where it is installed: the student completes beginnings of the text, the teacher judges.

    python -m benchmarks.real_pair.trl_row OPTIONS.json

It trains on what the student writes, not on the text itself; that is what the trainer is.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.real_pair.cost import run_measured
from benchmarks.real_pair.lora import LINEARS
from benchmarks.real_pair.places import Places
from benchmarks.real_pair.reading import packed
from benchmarks.real_pair.rows import Row, file_digest, model_digest, write_json

PROMPT = 256


@dataclass(frozen=True)
class TrlOptions:
    """How it is trained.

    Attributes:
        tokens: Of text whose sequences' first halves are the prompts.
        rate: Learning rate.
        epochs: Passes over the prompts.
        seed: Of everything random.
        beta: 0 is the forward KL.
        rank: Of every pair.
    """

    tokens: int
    rate: float
    epochs: int
    seed: int
    beta: float = 0.0
    rank: int = 64

    @property
    def name(self) -> str:
        """Of its row."""
        return f"trl-{self.tokens}-r{self.rate:g}-e{self.epochs}-s{self.seed}"


def trl_row(places: Places, options: TrlOptions, name: str | None = None) -> Row:
    """Train with TRL, unless its row is there.

    Raises:
        SystemExit: TRL is not installed.
    """
    missing = [module for module in ("trl", "datasets") if find_spec(module) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} not installed; pip install trl datasets")
    row = Row(places.rows / (name or options.name))
    inputs = {
        "kind": "trl",
        "options": asdict(options),
        "student_folder": places.student.name,
        "student": model_digest(places.student),
        "teacher": model_digest(places.teacher),
        "text": file_digest(places.text("train")),
    }

    def make() -> dict[str, Any]:
        file = row.folder / "options.json"
        folders = {"student": places.student, "teacher": places.teacher, "train": places.text("train")}
        wanted = {**{key: str(path) for key, path in folders.items()}, "adapter": str(row.adapter)}
        write_json(file, {**wanted, "options": asdict(options)})
        command = [sys.executable, "-m", "benchmarks.real_pair.trl_row", str(file)]
        return {"cost": run_measured(command, row.folder / "log.txt")}

    row.section("row", inputs, make)
    return row


def main() -> None:
    """Train as a file of options says."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    options = TrlOptions(**wanted["options"])
    tokenizer = AutoTokenizer.from_pretrained(wanted["student"], padding_side="left")
    sequences = packed(Path(wanted["train"]), Path(wanted["student"]), options.tokens)
    prompts = [tokenizer.decode(ids[:PROMPT]) for ids in sequences]
    arguments = DistillationConfig(
        output_dir=str(Path(wanted["adapter"]).parent / "trl"),
        learning_rate=options.rate,
        num_train_epochs=options.epochs,
        seed=options.seed,
        beta=options.beta,
        max_completion_length=sequences.shape[1] - PROMPT,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        teacher_model_init_kwargs={"dtype": "bfloat16"},
        save_strategy="no",
        report_to="none",
    )
    trainer = DistillationTrainer(
        model=wanted["student"],
        teacher_model=wanted["teacher"],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=options.rank, lora_alpha=options.rank, target_modules=list(LINEARS), task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model(wanted["adapter"])


if __name__ == "__main__":
    main()
