from __future__ import annotations

import json
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from moe_svd_distill.adapter.adapter_file import write_json
from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.load_check import check_loads
from moe_svd_distill.adapter.naming import lora_keys
from moe_svd_distill.errors import BadDataError, MissingInputError
from moe_svd_distill.families import Carrier
from moe_svd_distill.families.registry import families
from tests.adapter import tiny
from tests.adapter.conftest import Case

Write = Callable[..., Path]


def configuration_of(case: Case) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((case.adapter / "adapter_config.json").read_text())
    return content


def test_every_family_loads_whole(case: Case) -> None:
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


def test_memory_names_are_names_of_the_loaded_model(case: Case) -> None:
    from moe_svd_distill.adapter.targets import target_of

    model = tiny.load_model(case.student)
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    family = families()[case.name]
    targets = {target_of(family, name).memory_name for name in tiny.carried(case.student, embedding=True)}
    assert targets <= known
    assert set(check_loads(case.adapter, case.student).scales) == targets - {"model.embed_tokens"}


def test_a_missing_key_is_an_error(case: Case, write: Write) -> None:
    key = lora_keys("model.layers.1.self_attn.k_proj.weight")[1]
    changed = write(case, {name: value for name, value in case.pairs.items() if name != key})
    with pytest.raises(BadDataError, match=r"leaves empty .*layers\.1\.self_attn\.k_proj\.lora_B"):
        check_loads(changed, case.student)


@pytest.mark.parametrize("hub_name", ["model.layers.9.self_attn.q_proj.weight", "model.layers.0.extra.weight"])
def test_an_extra_key_is_an_error(case: Case, write: Write, hub_name: str) -> None:
    key_a, key_b = lora_keys(hub_name)
    changed = write(case, case.pairs | {key_a: torch.ones(4, 32), key_b: torch.ones(32, 4)})
    with pytest.raises(BadDataError, match=r"PEFT would drop .* and 1 more keys"):
        check_loads(changed, case.student)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe"])
@pytest.mark.parametrize("dropped", [".experts.2.", ".experts.3.", "up", "down"])
def test_a_dropped_expert_or_projection_is_an_error(
    make_case: Callable[[str], Case], write: Write, name: str, dropped: str
) -> None:
    case = make_case(name)
    role = next((r for r in families()[name].roles if r.role == f"experts.{dropped}"), None)
    gone = [
        hub_name
        for hub_name in tiny.carried(case.student)
        if (role.pattern.match(hub_name) if role else dropped in hub_name)
    ]
    keys = {key for hub_name in gone for key in lora_keys(hub_name)}
    assert keys
    changed = write(case, {key: value for key, value in case.pairs.items() if key not in keys})
    with pytest.raises(BadDataError):
        check_loads(changed, case.student)


def test_a_wrong_shape_is_an_error(case: Case, write: Write) -> None:
    key = lora_keys("model.layers.1.self_attn.q_proj.weight")[0]
    with pytest.raises(BadDataError, match="size mismatch"):
        check_loads(write(case, case.pairs | {key: torch.ones(4, 31)}), case.student)


def test_names_of_the_original_scripts_are_an_error(dense: Case, write: Write) -> None:
    for spell in (
        lambda key: key.replace(".lora_", ".weight.lora_"),
        lambda key: key.removeprefix("base_model.model.model."),
    ):
        with pytest.raises(BadDataError, match="PEFT would drop"):
            check_loads(write(dense, {spell(key): value for key, value in dense.pairs.items()}), dense.student)


def test_narrower_targets_are_an_error(case: Case, write: Write) -> None:
    configuration = configuration_of(case)
    configuration["target_modules"].remove("v_proj")
    with pytest.raises(BadDataError, match=r"PEFT would drop .*v_proj"):
        check_loads(write(case, case.pairs, configuration), case.student)


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


def test_pairs_of_tied_embeddings_are_an_error(tmp_path: Path) -> None:
    student = tiny.save_student(tmp_path / "student", "llama", tie_word_embeddings=True)
    pairs = tiny.random_pairs(student, ["model.embed_tokens.weight"])
    shapes = {key: tuple(value.shape) for key, value in pairs.items()}
    untied = build_configuration(shapes, families()["llama"], base_model="student", student_layers=tiny.LAYERS)
    adapter = tiny.save_adapter(tmp_path / "adapter", student, pairs, untied)
    with pytest.raises(BadDataError, match="ties its head"):
        check_loads(adapter, student)


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
    with pytest.raises(BadDataError, match="cannot build the student"):
        check_loads(dense.adapter, {"model_type": "nonsense"})


def test_code_of_a_checkpoint_never_runs(dense: Case, tmp_path: Path) -> None:
    config = tiny.config_of(dense.student) | {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for student in (tmp_path, config):
        with pytest.raises(BadDataError, match="cannot build the student"):
            check_loads(dense.adapter, student)
    assert not (tmp_path / "ran").exists()


def test_a_large_student_needs_neither_its_memory_nor_the_adapter_s(tmp_path: Path) -> None:
    """GLM-4.5-Air's sizes with 6 layers: 14 billion parameters, and an adapter file of 0.8 GB that is all hole."""
    layers, hidden, experts, width, rank = 6, 4096, 128, 1408, 16
    config = tiny.COMMON | tiny.MODELS["glm4_moe"]
    config |= {"num_hidden_layers": layers, "hidden_size": hidden, "n_routed_experts": experts, "head_dim": 128}
    config |= {"moe_intermediate_size": width, "intermediate_size": 10944, "num_attention_heads": 96}
    config |= {"num_key_value_heads": 8, "vocab_size": 151552}
    sizes = {"residual": hidden, "query heads": 96 * 128, "key-value heads": 1024, "experts": experts}
    shapes = {}
    for role in families()["glm4_moe"].roles:
        for layer in range(layers) if "{layer}" in role.template else ():
            placed = role.role.startswith("attention.") or role.role.startswith("dense.") == (layer == 0)
            if role.carrier is Carrier.NONE or not placed:
                continue
            neurons = 10944 if role.role.startswith("dense.") else width
            rows, columns = (neurons if axis.value == "neurons" else sizes[axis.value] for axis in role.axes)
            for expert in range(experts) if "{expert}" in role.template else (None,):
                key_a, key_b = lora_keys(role.name(layer, expert))
                shapes |= {key_a: (rank, columns), key_b: (rows, rank)}
    hollow_file(tmp_path / "adapter_model.safetensors", shapes)
    configuration = build_configuration(shapes, families()["glm4_moe"], base_model="big", student_layers=layers)
    write_json(tmp_path / "adapter_config.json", configuration)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = check_loads(tmp_path, config)
    assert report.keys == len(shapes)
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
