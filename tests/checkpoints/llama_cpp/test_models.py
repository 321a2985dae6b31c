"""Models written as llama.cpp's converter writes them are read back as they were."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.checkpoints.llama_cpp.folder import file_behind
from moe_svd_distill.errors import BadDataError, MissingInputError
from moe_svd_distill.evaluation.loading import load_model, model_bytes
from moe_svd_distill.pipeline.pair import open_model
from tests.support import architectures
from tests.support.heads import trained_tokenizer, with_tokenizer
from tests.support.models import logits, save

gguf = pytest.importorskip("gguf")
from tests.support.gguf_files import write_gguf  # noqa: E402

TOKENS, ROWS = 300, 320
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True},
    "mistral": {"sliding_window": None},  # llama.cpp has none for it
    "mixtral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_moe": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"norm_topk_prob": True},
    "gemma3_text": {  # of six layers the last one sees everything
        "tie_word_embeddings": True,
        "num_hidden_layers": 7,
        "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    },
    "deepseek_v2": {"q_lora_rank": None},
    "deepseek_v3": {"rope_parameters": YARN},
    "gpt_oss": {},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_tokenizer(tmp_path_factory.mktemp("tokenizer"), TOKENS)


def model_in(folder: Path, name: str, tokenizer: Path, **changes: Any) -> Path:
    model = architectures.build(name, vocab_size=ROWS, **{**MODELS[name], **changes})
    return with_tokenizer(save(model, folder, torch.float32), tokenizer)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_and_the_logits_are_the_original_s(tmp_path: Path, tokenizer: Path, name: str) -> None:
    original = model_in(tmp_path / "original", name, tokenizer)
    file = write_gguf(original, tmp_path / "model.gguf")
    found, wanted = open_model(str(file)), open_checkpoint(original)
    assert found.checkpoint.keys() == wanted.keys()
    assert not [reason for name, reason in found.checkpoint.set_aside.items() if not name.startswith("rope_freqs")]
    for tensor in wanted:
        assert found.checkpoint[tensor].shape == wanted[tensor].shape, tensor
        read = found.checkpoint.read(tensor)
        torch.testing.assert_close(read, wanted.read(tensor), rtol=0, atol=1e-6, msg=tensor)
        torch.testing.assert_close(found.checkpoint.read_rows(tensor, 1, 3), read[1:3], rtol=0, atol=0)
    folder = found.checkpoint.folder
    assert file_behind(folder) == file
    assert model_bytes(folder, 4) == sum(4 * wanted.read(tensor).numel() for tensor in wanted)
    ours, theirs = load_model(folder), load_model(original)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    assert type(ours) is type(theirs)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe"])
@pytest.mark.parametrize(("kind", "near"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1e-2)])
def test_rounded_types_are_as_near_as_they_can_be(
    tmp_path: Path, tokenizer: Path, name: str, kind: str, near: float
) -> None:
    original = model_in(tmp_path / "original", name, tokenizer)
    file = write_gguf(original, tmp_path / "model.gguf", kind)
    with open_checkpoint(file) as found, open_checkpoint(original) as wanted:
        assert kind in str(found.quantisation)
        for tensor in wanted:
            difference = (found.read(tensor).float() - wanted.read(tensor)).norm()
            assert float(difference) <= near * float(wanted.read(tensor).norm()), tensor
        ours, theirs = logits(load_model(found.folder)), logits(load_model(original))
    assert float((ours - theirs).norm()) <= 12 * near * float(theirs.norm())


def test_a_model_in_several_files(tmp_path: Path, tokenizer: Path) -> None:
    original = model_in(tmp_path / "original", "qwen3_moe", tokenizer)
    first = write_gguf(original, tmp_path / "model.gguf", split=12)
    assert first.name.startswith("model-00001-of-")
    with open_checkpoint(str(first)) as found, open_checkpoint(original) as wanted:
        assert len({info.file for info in found.stored.values()}) > 2
        assert all(torch.equal(found.read(name), wanted.read(name)) for name in wanted)
        again = pickle.loads(pickle.dumps(found))  # noqa: S301
        assert again.fingerprint() == found.fingerprint()
        assert again.keys() == found.keys()
        key = found.cache_key()
        assert again.cache_key() == key
        (tmp_path / "config.json").write_text("{}")  # what lies beside the files is not the model's
        assert found.cache_key() == key
        last = max(tmp_path.glob("model-*.gguf"))
        content = bytearray(last.read_bytes())
        content[len(content) * 3 // 4] ^= 1
        last.write_bytes(content)
        assert found.cache_key() != key
    others = sorted(tmp_path.glob("model-*.gguf"))
    with pytest.raises(MissingInputError, match="not the first of its"):
        open_checkpoint(others[1])
    others[-1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(MissingInputError, match="lacks 1 of"):
        open_checkpoint(first)
    (tmp_path / "elsewhere.gguf").rename(others[-1])
    others[1].write_bytes(others[2].read_bytes())
    with pytest.raises(BadDataError, match="says it is number 2"):
        open_checkpoint(first)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_beside_the_embeddings_is_tied_if_it_is_the_same(tmp_path: Path, tokenizer: Path, tied: bool) -> None:
    """Files of tied models may have both, each rounded its own way; the adapter is for the tied original."""
    original = model_in(tmp_path / "original", "qwen2", tokenizer, tie_word_embeddings=True)
    with open_checkpoint(original) as wanted:
        table = wanted.read("model.embed_tokens.weight").clone()
    head = table if tied else table.roll(1, 0)

    def with_head(writer: Any) -> None:
        writer.add_tensor("output.weight", head.numpy())

    with open_checkpoint(write_gguf(original, tmp_path / "model.gguf", "Q4_0", change=with_head)) as found:
        assert found.config["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in found) is not tied
        assert ("token_embd.weight" in found.set_aside) is tied
        assert torch.equal(found.read("model.embed_tokens.weight"), table) is tied
        load_model(found.folder)


def test_the_tokenizer_is_the_original_s(tmp_path: Path, tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    from moe_svd_distill.calibration.tokenizer import load_tokenizer
    from moe_svd_distill.calibration.vocabulary import compare_vocabularies

    original = model_in(tmp_path / "original", "llama", tokenizer)
    settings = json.loads((original / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}"
    (original / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    with open_checkpoint(write_gguf(original, tmp_path / "model.gguf")) as found:
        folder = found.folder
        assert found.folder == folder
        texts = ["A text, with 12 numbers,\n\n  spaces and <end> inside. Größe <|endoftext|>"]
        ours, theirs = load_tokenizer(folder), load_tokenizer(original)
        assert ours.encode(texts) == theirs.encode(texts)
        assert ours.end_of_text == theirs.end_of_text
        auto = AutoTokenizer.from_pretrained(folder)
        assert [auto(texts[0])["input_ids"]] == ours.encode(texts)
        assert max(ours.encode(texts)[0]) < TOKENS
        assert "<|endoftext|>" not in auto.get_vocab()
        chat = [{"role": "user", "content": "hello"}]
        assert auto.apply_chat_template(chat, tokenize=False) == "hello<end>"
        assert compare_vocabularies(folder, original).equal


def test_a_tokenizer_that_transformers_cannot_make_is_asked_for(tmp_path: Path, tokenizer: Path) -> None:
    original = model_in(tmp_path / "original", "llama", tokenizer)

    def unknown(writer: Any) -> None:
        writer.kv_data[0]["tokenizer.ggml.pre"].value = "of-my-own"

    place = tmp_path / "alone"
    place.mkdir()
    with open_checkpoint(write_gguf(original, place / "model.gguf", change=unknown)) as found:
        with pytest.raises(BadDataError, match="of-my-own"):
            _ = found.folder
        with_tokenizer(place, tokenizer)
        assert (found.folder / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
        (note,) = found.tokenizer_notes
        assert note.startswith(
            f"the tokenizer of {found.source} is the tokenizer.json beside it: transformers makes none"
        )
        assert "of-my-own" in note
