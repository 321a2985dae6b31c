"""The published models: complete, small, and with the figures that pairs.yaml states."""

import json
import struct

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.corpus import read_lines
from lab.measure import compare, heldout_windows, load_model
from lab.plan import LAB, MODELS, PAIRS, SPECS, TEXT

PUBLISHED = yaml.safe_load(PAIRS.read_text("utf-8"))["pairs"]
NAMES = [spec.name for spec in SPECS]


def header(name: str) -> dict:
    with (MODELS / name / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        content = json.loads(file.read(length))
    content.pop("__metadata__", None)
    return content


@pytest.mark.parametrize("name", NAMES)
def test_model_loads_without_missing_or_unexpected_keys(name):
    model, info = AutoModelForCausalLM.from_pretrained(MODELS / name, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.dtype is torch.bfloat16
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_weights_have_the_layout_of_the_hub(name):
    tensors = header(name)
    config = json.loads((MODELS / name / "config.json").read_text("utf-8"))
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    assert not config["tie_word_embeddings"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    if config["model_type"] == "qwen3_moe":
        last = config["num_experts"] - 1
        shape = tensors[f"model.layers.0.mlp.experts.{last}.gate_proj.weight"]["shape"]
        assert shape == [config["moe_intermediate_size"], config["hidden_size"]]


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_round_trips(name):
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    text = "def naïve(x):\n\treturn {'→': x**2}  # ☃\n\n"
    assert len(tokenizer) == 2048
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0


def test_models_share_one_tokenizer():
    assert len({(MODELS / name / "tokenizer.json").read_bytes() for name in NAMES}) == 1


def test_there_are_four_pairs():
    assert list(PUBLISHED) == ["independent", "pruned", "sibling", "dense"]


@pytest.mark.parametrize("name", ["independent", "pruned", "sibling", "dense"])
def test_student_is_behind_its_teacher(name):
    pair = PUBLISHED[name]
    stated = pair["figures"]
    assert stated["gap"] >= 0.3
    teacher, student = (LAB / pair[role] for role in ("teacher", "student"))
    windows = heldout_windows(teacher, read_lines(TEXT / "heldout.jsonl"))[::25]
    figures = compare(load_model(teacher), load_model(student), windows)
    assert figures.gap >= 0.2
    assert figures.kl == pytest.approx(stated["kl"], rel=0.25)


def test_size_of_what_is_committed():
    files = [path for folder in (MODELS, TEXT) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40_000_000
