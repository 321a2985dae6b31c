"""An adapter as llama.cpp's file: applied to the model's GGUF file by llama.cpp's formula it is what PEFT computes."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.export import export
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import BadDataError, MissingInputError
from moe_svd_distill.evaluation.loading import load_model
from moe_svd_distill.pipeline.pair import open_model
from tests.support import architectures, tiny
from tests.support.heads import trained_tokenizer, with_tokenizer
from tests.support.models import logits, save

gguf = pytest.importorskip("gguf")
from tests.support.gguf_files import ARCHITECTURES, write_gguf  # noqa: E402

TOKENS, ROWS = 300, 320
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "gemma3_text": (  # of six layers the last one sees everything
        "gemma3_text",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 7,
            "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
        },
    ),
    "gpt_oss": ("gpt_oss", {}),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_tokenizer(tmp_path_factory.mktemp("tokenizer"), TOKENS)


def student_in(folder: Path, name: str, tokenizer: Path) -> Path:
    model_type, changes = MODELS[name]
    model = architectures.build(model_type, vocab_size=ROWS, **changes)
    return with_tokenizer(save(model, folder, torch.float32), tokenizer)


def adapter_in(folder: Path, student: Path, *, dtype: torch.dtype = torch.float32, names: Any = None) -> Path:
    """Random pairs of several ranks."""

    def rank(name: str) -> int:
        return 6 if "lm_head" in name else 5 if "self_attn" in name else 4

    names = names or tiny.carried(student)
    keys = tiny.keys_of(student)
    ranks = {target.parameter: target.rank(rank) for target in keys.changed_by(names)}
    configuration = build_configuration(keys, ranks, base_model=str(student))
    pairs = tiny.random_pairs(student, names, rank=rank, dtype=dtype)
    return tiny.save_adapter(folder, student, pairs, configuration)


def apply(file: Path, writer: Any) -> None:
    """What llama.cpp adds to the product of a tensor: ``alpha / rank · B (A x)``, of each expert (`build_lora_mm`)."""
    reader = gguf.GGUFReader(file)
    (alpha,) = reader.fields["adapter.lora.alpha"].parts[-1]
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    tensors = {name: info for split in writer.tensors for name, info in split.items()}
    for name in {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in stored}:
        a, b = stored[f"{name}.lora_a"].copy(), stored[f"{name}.lora_b"].copy()
        base = tensors[name].tensor
        if name == "token_embd.weight":  # a row of A is looked up, and B is (hidden, rank)
            change = alpha / b.shape[-1] * (a @ b.T)
        else:
            change = alpha / b.shape[-1] * np.matmul(b, a)
        tensors[name].tensor = base + change.reshape(base.shape).astype(np.float32)
        assert change.size == base.size


def peft_logits(student: Path, adapter: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(architectures.load(student), str(adapter)).eval())


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_s_formula_gives_peft_s_logits(name: str, tmp_path: Path, tokenizer: Path) -> None:
    student = student_in(tmp_path / "student", name, tokenizer)
    adapter = adapter_in(tmp_path / "adapter", student)
    report = export(adapter, tmp_path / "out", "gguf", student)
    assert report.loads is None
    file = tmp_path / "out" / "adapter_model.gguf"
    reader = gguf.GGUFReader(file)
    said = {key: reader.fields[key].contents() for key in ("general.architecture", "general.type", "adapter.type")}
    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[MODELS[name][0]]]]
    assert list(said.values()) == [architecture, "adapter", "lora"]
    assert len(reader.tensors) == report.tensors
    adapted = write_gguf(student, tmp_path / "adapted.gguf", change=partial(apply, file))
    with open_checkpoint(adapted) as found:
        ours = logits(load_model(found.folder))
    wanted = peft_logits(student, adapter)
    assert float((wanted - logits(architectures.load(student))).abs().max()) > 1e-2
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


def test_factors_keep_their_type_where_they_are_not_scaled(tmp_path: Path, tokenizer: Path) -> None:
    student = student_in(tmp_path / "student", "llama", tokenizer)
    adapter = adapter_in(tmp_path / "adapter", student, dtype=torch.bfloat16)
    export(adapter, tmp_path / "out", "gguf", student)
    found = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(tmp_path / "out" / "adapter_model.gguf").tensors
    }
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 5
    assert found["blk.0.attn_q.weight.lora_b"] == found["output.weight.lora_a"] == "BF16"
    assert found["output.weight.lora_b"] == found["blk.0.ffn_up.weight.lora_b"] == "F32"


def test_the_embeddings_and_a_scale_of_peft(tmp_path: Path, tokenizer: Path) -> None:
    student = student_in(tmp_path / "student", "llama", tokenizer)
    names = tiny.carried(student, embedding=True)
    adapter = adapter_in(tmp_path / "adapter", student, names=names)
    configuration = json.loads((adapter / "adapter_config.json").read_text())
    configuration["lora_alpha"] *= 3
    configuration["alpha_pattern"] = {key: 2 * value for key, value in configuration["alpha_pattern"].items()}
    (adapter / "adapter_config.json").write_text(json.dumps(configuration))
    export(adapter, tmp_path / "out", "gguf", student)
    file = tmp_path / "out" / "adapter_model.gguf"
    adapted = write_gguf(student, tmp_path / "adapted.gguf", change=partial(apply, file))
    with open_checkpoint(adapted) as found:
        ours = logits(load_model(found.folder))
    torch.testing.assert_close(ours, peft_logits(student, adapter), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"r": None}, "no usable rank"), ({"r": "x"}, "no usable rank"), ({"use_dora": True}, "use_dora is True")],
)
def test_a_configuration_that_does_not_fit(
    changes: dict[str, Any], words: str, tmp_path: Path, tokenizer: Path
) -> None:
    student = student_in(tmp_path / "student", "llama", tokenizer)
    adapter = adapter_in(tmp_path / "adapter", student)
    configuration = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(configuration | changes))
    with pytest.raises(BadDataError, match=words):
        export(adapter, tmp_path / "out", "gguf", student)


def test_a_gguf_student(tmp_path: Path, tokenizer: Path) -> None:
    student = student_in(tmp_path / "student", "qwen3_moe", tokenizer)
    adapter = adapter_in(tmp_path / "adapter", student)
    export(adapter, tmp_path / "one", "gguf", student)
    with open_model(str(write_gguf(student, tmp_path / "model.gguf", "Q8_0"))).checkpoint as file:
        export(adapter, tmp_path / "other", "gguf", file)
    contents = [(tmp_path / out / "adapter_model.gguf").read_bytes() for out in ("one", "other")]
    assert contents[0] == contents[1]


def test_a_layout_of_peft_is_as_good(tmp_path: Path, tokenizer: Path) -> None:
    student = student_in(tmp_path / "student", "qwen3_moe", tokenizer)
    adapter = adapter_in(tmp_path / "adapter", student)
    export(adapter, tmp_path / "fused", "fused", student)
    export(tmp_path / "fused", tmp_path / "out", "gguf", student)
    file = tmp_path / "out" / "adapter_model.gguf"
    adapted = write_gguf(student, tmp_path / "adapted.gguf", change=partial(apply, file))
    with open_checkpoint(adapted) as found:
        ours = logits(load_model(found.folder))
    torch.testing.assert_close(ours, peft_logits(student, adapter), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["glm4_moe", "olmo2"])
def test_an_architecture_without_a_table_is_refused(name: str, tmp_path: Path) -> None:
    student = architectures.saved(name, tmp_path / "student")
    adapter = adapter_in(tmp_path / "adapter", student)
    with pytest.raises(BadDataError, match=f"{name}.*merge"):
        export(adapter, tmp_path / "out", "gguf", student)
    assert not (tmp_path / "out").exists()


def test_what_llama_cpp_would_leave_without_effect_is_refused(tmp_path: Path) -> None:
    student = architectures.saved("deepseek_v3", tmp_path / "student")
    adapter = adapter_in(tmp_path / "adapter", student)
    with pytest.raises(
        BadDataError, match=r"llama\.cpp applies no adapter to lm_head.weight and \d+ more of deepseek2"
    ) as error:
        export(adapter, tmp_path / "out", "gguf", student)
    assert "merge" in error.value.action.lower()
    experts = [name for name in tiny.carried(student) if ".mlp." in name]
    export(adapter_in(tmp_path / "experts", student, names=experts), tmp_path / "out", "gguf", student)


def test_a_head_that_is_saved_whole_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    student = student_in(tmp_path / "student", "qwen2 tied", tokenizer)
    pairs = tiny.with_whole_head(student, tiny.random_pairs(student, dtype=torch.float32))
    adapter = tiny.save_adapter(tmp_path / "adapter", student, pairs)
    with pytest.raises(BadDataError, match="whole"):
        export(adapter, tmp_path / "out", "gguf", student)


def test_without_the_package(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_in(tmp_path / "student", "llama", tokenizer)
    adapter = adapter_in(tmp_path / "adapter", student)
    monkeypatch.setattr("moe_svd_distill.checkpoints.llama_cpp.header.find_spec", lambda name: None)
    with pytest.raises(MissingInputError, match="gguf"):
        export(adapter, tmp_path / "out", "gguf", student)


def test_a_value_that_is_no_number_is_not_written(tmp_path: Path, tokenizer: Path) -> None:
    student = student_in(tmp_path / "student", "llama", tokenizer)
    pairs = tiny.random_pairs(student, dtype=torch.float32)
    next(iter(pairs.values())).view(-1)[0] = float("nan")
    adapter = tiny.save_adapter(tmp_path / "adapter", student, pairs)
    with pytest.raises(BadDataError, match="NaN"):
        export(adapter, tmp_path / "out", "gguf", student)
    assert not (tmp_path / "out").exists()
