"""Train the lab: `python -m lab.train --documentation DIR [--only NAME]`.

Every model is published under lab/models as soon as it is trained. Models already trained are skipped, so a broken run
goes on with the model it was at; delete lab/.work to begin anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lab import corpus
from lab.architectures import fresh_model
from lab.cropping import crop_into
from lab.measure import cross_entropy, heldout_windows
from lab.pairs import fill_figures
from lab.plan import MODELS, SPECS, TEXT, WORK, ModelSpec, spec_named
from lab.tokenizer import encode, load_tokenizer, train_tokenizer
from lab.training import Snapshot, be_deterministic, train

_LEFT_OUT = ("backend", "is_local", "local_files_only")


def snapshot_path(name: str, fraction: float) -> Path:
    """Where the state of a model after a fraction of its training is kept."""
    return WORK / name / f"at-{fraction:g}.pt"


def prepare_text(documentation: Path | None) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """Collect and publish the text, train the tokenizer, and encode the training split; done once."""
    folder, tokens = WORK / "tokenizer", WORK / "train.npy"
    if not tokens.exists():
        documents = corpus.split(corpus.collect(documentation))
        corpus.publish(documents)
        tokenizer = train_tokenizer(documents.train)
        tokenizer.save_pretrained(folder)
        np.save(tokens, encode(tokenizer, documents.train))
    return load_tokenizer(folder), np.load(tokens)


def trained(spec: ModelSpec, tokens: np.ndarray) -> PreTrainedModel:
    """Train one model from where its specification says it starts."""
    model = fresh_model(spec.architecture, spec.initial_seed)
    if spec.cropped_from is not None:
        original = spec_named(spec.cropped_from)
        larger = fresh_model(original.architecture, original.initial_seed)
        larger.load_state_dict(torch.load(WORK / original.name / "final.pt", weights_only=True))
        crop_into(model, larger)
    branch = None
    if spec.branch_of is not None:
        branch = Snapshot.load(snapshot_path(spec.branch_of, spec.branch_at))
    snapshots = {round(part * spec.schedule.steps): snapshot_path(spec.name, part) for part in spec.snapshots}
    train(
        model,
        tokens,
        spec.schedule,
        branch=branch,
        snapshots=snapshots,
        report=lambda line: print(f"[{spec.name}] {line}", flush=True),
    )
    return model


def _plain(folder: Path) -> None:
    """Write the configurations as hub models have them, readable by every version of transformers.

    Version 5 writes `num_local_experts` and a tokenizer class that version 4 does not know.
    """
    for name, renamed in (("config.json", {"num_local_experts": "num_experts"}), ("tokenizer_config.json", {})):
        path = folder / name
        content = {renamed.get(key, key): value for key, value in json.loads(path.read_text("utf-8")).items()}
        if "tokenizer_class" in content:
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
            content = {key: value for key, value in content.items() if key not in _LEFT_OUT}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def publish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model in bfloat16, with its tokenizer, replacing what the folder held."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    _plain(partial)
    for path in partial.iterdir():
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def train_and_publish(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray) -> None:
    """Train one model, unless that is done already, and publish it."""
    final = WORK / spec.name / "final.pt"
    if final.exists():
        print(f"[{spec.name}] trained already", flush=True)
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    model = trained(spec, tokens)
    torch.save(model.state_dict(), final)
    publish(model, tokenizer, MODELS / spec.name)
    windows = heldout_windows(MODELS / spec.name, corpus.read_lines(TEXT / "heldout.jsonl"))
    loss = cross_entropy(model.float().eval(), windows)
    seconds = time.monotonic() - began
    note = {"tokens": spec.schedule.tokens, "seconds": round(seconds), "heldout_cross_entropy": round(loss, 4)}
    (final.parent / "done.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
    print(f"[{spec.name}] published: held-out cross-entropy {loss:.3f}, {seconds / 60:.1f} min", flush=True)


def main() -> None:
    """Train all models, or those named, and fill in the pairs' figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documentation", type=Path, help="folder with the .rst sources of Python's documentation")
    parser.add_argument("--only", action="append", choices=[spec.name for spec in SPECS], help="train only this model")
    options = parser.parse_args()
    be_deterministic()
    WORK.mkdir(parents=True, exist_ok=True)
    tokenizer, tokens = prepare_text(options.documentation)
    print(f"{len(tokens):,} training tokens", flush=True)
    for spec in SPECS:
        if options.only is None or spec.name in options.only:
            train_and_publish(spec, tokenizer, tokens)
    fill_figures()


if __name__ == "__main__":
    main()
