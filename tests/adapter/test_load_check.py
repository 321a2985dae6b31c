from __future__ import annotations

import json
import re
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from moe_svd_distill.adapter.keys import planned_tensors
from moe_svd_distill.adapter.merge import merge
from moe_svd_distill.adapter.naming import lora_keys
from moe_svd_distill.adapter.verify import check_loads, verify
from moe_svd_distill.errors import BadDataError, MissingInputError
from moe_svd_distill.files.writing import write_json
from tests.adapter.conftest import Case
from tests.support import tiny
from tests.support.architectures import saved

Write = Callable[..., Path]


def configuration_of(case: Case) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((case.adapter / "adapter_config.json").read_text())
    return content


def test_every_make_of_student_loads_whole(case: Case) -> None:
    report = check_loads(case.adapter, case.student)
    assert (report.missing, report.unexpected) == ((), ())
    assert report.keys == len(case.pairs)
    assert set(report.scales.values()) == {1.0}
    assert check_loads(case.adapter, tiny.config_of(case.student)) == report


def test_what_peft_asks_by_an_old_name_warns_nobody(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        check_loads(case.adapter, case.student)


def test_the_check_targets_what_peft_targets(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(tiny.load_model(case.student), str(case.adapter))
    names = {name.replace(".base_layer", "") for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    report = check_loads(case.adapter, case.student)
    assert report.targets == len(
        [name for name, module in loaded.named_modules() if hasattr(module, "lora_A") and hasattr(module, "scaling")]
    )
    assert {
        f"base_model.model.{name}" for name in report.scales if "experts." not in name and "mlp" not in name
    } <= names


def test_targets_are_parameters_of_the_loaded_model(case: Case) -> None:
    keys = tiny.keys_of(case.student)
    known = {name.removesuffix(".weight") for name, _ in tiny.load_model(case.student).named_parameters()}
    wanted = {target.parameter.removesuffix(".weight") for target in keys.targets.values() if not target.embedding}
    assert wanted <= known
    assert set(check_loads(case.adapter, case.student).scales) == wanted


def test_a_missing_key_is_an_error(case: Case, write: Write) -> None:
    key = lora_keys("model.layers.1.self_attn.o_proj")[1]
    changed = write(case, {name: value for name, value in case.pairs.items() if name != key})
    with pytest.raises(BadDataError, match=r"leaves empty .*layers\.1\.self_attn\.o_proj\.lora_B"):
        check_loads(changed, case.student)


@pytest.mark.parametrize("hub_name", ["model.layers.9.self_attn.q_proj", "model.layers.0.extra"])
def test_an_extra_key_is_an_error(case: Case, write: Write, hub_name: str) -> None:
    key_a, key_b = lora_keys(hub_name)
    changed = write(case, case.pairs | {key_a: torch.ones(4, 32), key_b: torch.ones(32, 4)})
    with pytest.raises(BadDataError, match=r"PEFT would drop .* and 1 more keys"):
        check_loads(changed, case.student)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    "dropped", [r"experts\.2\.", r"experts\.3\.", r"experts\..*(up_proj|w3)", r"experts\..*(down_proj|w2)"]
)
def test_a_dropped_expert_or_projection_is_an_error(
    make_case: Callable[[str], Case], write: Write, name: str, dropped: str
) -> None:
    case = make_case(name)
    kept = {key: value for key, value in case.pairs.items() if not re.search(dropped, key)}
    assert kept.keys() < case.pairs.keys()
    with pytest.raises(BadDataError):
        check_loads(write(case, kept), case.student)


def test_an_expert_of_another_rank_is_an_error(sparse: Case, write: Write) -> None:
    key_a, key_b = lora_keys("model.layers.1.mlp.experts.2.up_proj")
    odd = {key_a: sparse.pairs[key_a][:3].clone(), key_b: sparse.pairs[key_b][:, :3].clone()}
    with pytest.raises(BadDataError):
        check_loads(write(sparse, sparse.pairs | odd), sparse.student)


def test_a_wrong_shape_is_an_error(case: Case, write: Write) -> None:
    key = lora_keys("model.layers.1.self_attn.o_proj")[0]
    with pytest.raises(BadDataError, match="size mismatch"):
        check_loads(write(case, case.pairs | {key: torch.ones(4, 31)}), case.student)


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
def test_leaf_names_in_target_modules_are_caught(make_case: Callable[[str], Case], write: Write, name: str) -> None:
    """The configuration that PEFT rewrites into experts, dropping the dense and shared pairs without a word."""
    case = make_case(name)
    configuration = configuration_of(case)
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate", "lm_head"]
    configuration |= {"target_modules": leaves, "target_parameters": None}
    configuration |= {"rank_pattern": {"lm_head": 8}, "alpha_pattern": {"lm_head": 8}}
    with pytest.raises(BadDataError):
        check_loads(write(case, case.pairs, configuration), case.student)


@pytest.mark.parametrize("end", ["lm_head.weight", "model.embed_tokens.weight"])
def test_pairs_of_tied_embeddings_are_an_error(dense: Case, tmp_path: Path, end: str) -> None:
    tied = tiny.save_student(tmp_path / "student", "llama", tie_word_embeddings=True)
    adapter = tiny.save_adapter(tmp_path / "adapter", dense.student, tiny.random_pairs(dense.student, [end]))
    check_loads(adapter, dense.student)
    with pytest.raises(BadDataError, match="ties its head"):
        check_loads(adapter, tied)


def test_pairs_of_tied_embeddings_under_another_name_in_memory(tmp_path: Path) -> None:
    """A wrapper's checkpoint has names that PEFT renames when it loads: what it targets counts."""
    student = saved("gemma3", tmp_path / "student", tie_word_embeddings=True)
    keys = tiny.keys_of(student)
    (target,) = (target for target in keys.targets.values() if target.embedding)
    assert target.names[0] != target.parameter
    rows, columns = keys.architecture.embedding_slot.shape
    given = tiny.GivenPairs({target.names[0]: (torch.ones(rows, 2), torch.ones(2, columns))})
    planned = planned_tensors(keys, [target], {target.parameter: target.module}, given)
    tensors = {key: torch.ones(plan.shape) for key, plan in planned.items()}
    configuration = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]}
    adapter = tiny.save_adapter(tmp_path / "a", student, tensors, configuration)
    with pytest.raises(BadDataError, match="ties its head"):
        check_loads(adapter, student)


OPTIONS = [
    {"use_dora": True},
    {"bias": "all"},
    {"lora_bias": True},
    {"fan_in_fan_out": True},
    {"ensure_weight_tying": True},
    {"exclude_modules": ["q_proj"]},
    {"layers_to_transform": [0]},
    {"layer_replication": [[0, 2]]},
    {"trainable_token_indices": [1]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": "lm_head"},
    {"modules_to_save": 5},
]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: next(iter(option)))
def test_what_is_more_than_plain_pairs_is_refused_everywhere(
    dense: Case, write: Write, tmp_path: Path, option: dict[str, Any]
) -> None:
    changed = write(dense, dense.pairs, configuration_of(dense) | option)
    away = configuration_of(dense) | option | {"base_model_name_or_path": "organisation/student"}
    for call in (
        lambda: check_loads(changed, dense.student),
        lambda: verify(changed, dense.student),
        lambda: verify(tiny.save_adapter(tmp_path / "away", dense.student, dense.pairs, away)),
        lambda: merge(changed, dense.student, tmp_path / "out"),
    ):
        with pytest.raises(BadDataError, match=f"{next(iter(option))} is "):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "PEFT would drop"),
        ({"target_modules": 7}, "PEFT"),
        ({"target_parameters": ["nowhere.weight"]}, "PEFT"),
        ({"rank_pattern": {}}, "size mismatch"),
        ({"r": 5}, "size mismatch"),
        ({"rank_pattern": {"(": 3}}, "PEFT"),
        ({"lora_alpha": None}, "PEFT"),
    ],
)
def test_a_configuration_that_does_not_fit_the_tensors_is_refused(
    sparse: Case, write: Write, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    changed = write(sparse, sparse.pairs, configuration_of(sparse) | change)
    with pytest.raises(BadDataError, match=message):
        check_loads(changed, sparse.student)
    with pytest.raises(BadDataError):
        merge(changed, sparse.student, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_student_is_checked_like_a_plain_one(case: Case) -> None:
    fields = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = tiny.config_of(case.student) | {"quantization_config": fields}
    assert check_loads(case.adapter, config) == check_loads(case.adapter, case.student)


def test_files_that_are_not_there_or_not_peft(dense: Case, write: Write, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"adapter_model\.safetensors"):
        check_loads(tmp_path, dense.student)
    with pytest.raises(MissingInputError, match=r"config\.json"):
        check_loads(dense.adapter, tmp_path)
    changed = write(dense, dense.pairs, {"peft_type": "LOHA", "r": 4})
    with pytest.raises(BadDataError, match="LOHA"):
        check_loads(changed, dense.student)
    (changed / "adapter_config.json").unlink()
    with pytest.raises(MissingInputError, match=r"adapter_config\.json"):
        check_loads(changed, dense.student)
    with pytest.raises(BadDataError, match="transformers does not know"):
        check_loads(dense.adapter, {"model_type": "nonsense"})


def test_code_of_a_checkpoint_never_runs(dense: Case, tmp_path: Path) -> None:
    config = tiny.config_of(dense.student) | {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for student in (tmp_path, config):
        with pytest.raises(BadDataError, match="transformers does not know"):
            check_loads(dense.adapter, student)
    assert not (tmp_path / "ran").exists()


def test_a_large_student_needs_neither_its_memory_nor_the_adapter_s(tmp_path: Path) -> None:
    """GLM-4.5-Air's sizes with 6 layers: 14 billion parameters, and an adapter file of 0.8 GB that is all hole."""
    layers, hidden, experts, width, rank = 6, 4096, 128, 1408, 16
    config = tiny.COMMON | tiny.MODELS["glm4_moe"]
    config |= {"num_hidden_layers": layers, "hidden_size": hidden, "n_routed_experts": experts, "head_dim": 128}
    config |= {"moe_intermediate_size": width, "intermediate_size": 10944, "num_attention_heads": 96}
    config |= {"num_key_value_heads": 8, "vocab_size": 151552}
    small = tiny.save_student(tmp_path / "small", "glm4_moe", num_hidden_layers=layers)
    sizes = {"self_attn.q": (96 * 128, hidden), "self_attn.k": (1024, hidden), "self_attn.v": (1024, hidden)}
    sizes |= {"self_attn.o": (hidden, 96 * 128), "mlp.gate_proj": (10944, hidden), "mlp.gate": (experts, hidden)}
    body = [name.removesuffix(".weight") for name in tiny.carried(small) if name != "lm_head.weight"]
    shapes = {}
    for module in (module for module in body if not re.search(r"experts\.[1-9]", module)):
        neurons = 10944 if "layers.0.mlp" in module else width
        rows, columns = next((size for part, size in sizes.items() if part in module), (neurons, hidden))
        rows, columns = (columns, rows) if "down_proj" in module else (rows, columns)
        for expert in range(experts) if ".experts.0." in module else (0,):
            key_a, key_b = lora_keys(module.replace(".experts.0.", f".experts.{expert}."))
            shapes |= {key_a: (rank, columns), key_b: (rows, rank)}
    hollow_file(tmp_path / "adapter_model.safetensors", shapes)
    pairs = tiny.random_pairs(small, [f"{module}.weight" for module in body], rank=lambda _: rank)
    write_json(tmp_path / "adapter_config.json", tiny.configure(small, pairs))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = check_loads(tmp_path, config)
    assert report.keys == len(shapes) == 2 * (layers * 4 + 3 + (layers - 1) * (4 + 3 * experts))
    assert report.targets == layers * 4 + 3 + (layers - 1) * (1 + 2 + 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def hollow_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A valid safetensors file of zeros that takes no space."""
    header: dict[str, Any] = {}
    offset = 0
    for key, (rows, columns) in shapes.items():
        end = offset + 2 * rows * columns
        header[key] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
