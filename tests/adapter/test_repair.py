from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_svd_distill.adapter.naming import lora_keys, parse_key
from moe_svd_distill.adapter.repair import rebuild_configuration, repair_keys, repaired_keys
from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.errors import BadDataError, CannotWriteError, MissingInputError
from moe_svd_distill.files.writing import write_json
from tests.adapter.conftest import Case

Write = Callable[..., Path]
SPELLINGS: dict[str, Callable[[str], str]] = {
    "weight kept": lambda key: key.replace(".lora_", ".weight.lora_"),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "both": lambda key: key.removeprefix("base_model.model.").replace(".lora_", ".weight.lora_"),
    "adapter name": lambda key: key.removesuffix(".weight") + ".default.weight",
    "no weight behind": lambda key: key.removesuffix(".weight"),
}


def test_a_student_gives_the_configuration_back(case: Case) -> None:
    expected = json.loads((case.adapter / "adapter_config.json").read_text())
    assert rebuild_configuration(case.adapter / "adapter_model.safetensors", case.student) == expected
    assert rebuild_configuration(case.adapter, case.student, base_model="a/b")["base_model_name_or_path"] == "a/b"


def test_without_a_student_last_names_alone_are_written(case: Case) -> None:
    found = rebuild_configuration(case.adapter, base_model="a/b")
    modules = {parse_key(key)[0] for key in case.pairs}
    assert set(found["target_modules"]) == {module.rpartition(".")[2] for module in modules}
    assert (found["target_parameters"], found["base_model_name_or_path"]) == ([], "a/b")
    if case.name in ("llama", "qwen3"):
        assert found["rank_pattern"] == {"lm_head": 8}


def test_dense_models_load_without_a_student_s_help(
    make_case: Callable[[str], Case], write: Callable[..., Path]
) -> None:
    for name in ("llama", "qwen3"):
        case = make_case(name)
        adapter = write(case, case.pairs, rebuild_configuration(case.adapter))
        assert check_loads(adapter, case.student).scales == check_loads(case.adapter, case.student).scales


@pytest.mark.parametrize("part", [r"experts\.3\.up_proj", r"experts\.0\.gate_proj"])
def test_experts_without_a_pair_are_named(sparse: Case, write: Write, part: str) -> None:
    kept = {key: value for key, value in sparse.pairs.items() if not re.search(part, key)}
    with pytest.raises(BadDataError, match=rf"layers\.1\.mlp\.{part}\.weight has no LoRA pair, but others of"):
        rebuild_configuration(write(sparse, kept), sparse.student)


def test_no_weights_are_read(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("moe_svd_distill.checkpoints.tensors.tensor_view", forbidden)
    assert rebuild_configuration(case.adapter, case.student)


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_wrong_names_are_refused_and_can_be_repaired(case: Case, tmp_path: Path, spelling: str) -> None:
    wrong = {SPELLINGS[spelling](key): value for key, value in case.pairs.items()}
    file = tmp_path / "wrong.safetensors"
    save_file(wrong, file, metadata={"note": "kept"})
    before = file.read_bytes()
    for student in (case.student, None):
        with pytest.raises(BadDataError, match=f"PEFT never matches {len(wrong)} of {len(wrong)} tensors"):
            rebuild_configuration(file, student)
    assert file.read_bytes() == before
    folder = tmp_path / "repaired"
    folder.mkdir()
    renamed = repair_keys(file, folder / "adapter_model.safetensors")
    assert renamed == {SPELLINGS[spelling](key): key for key in case.pairs}
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == case.pairs.keys()
    assert all(torch.equal(found[key], case.pairs[key]) for key in found)
    write_json(folder / "adapter_config.json", rebuild_configuration(folder, case.student))
    assert check_loads(folder, case.student).unexpected == ()


def test_right_names_stay_and_hopeless_ones_are_refused() -> None:
    keys = [*lora_keys("lm_head"), *lora_keys("model.embed_tokens", embedding=True), *lora_keys("mlp.experts")]
    assert repaired_keys(keys) == {key: key for key in keys}
    with pytest.raises(BadDataError, match="in no known spelling"):
        repaired_keys(["model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(BadDataError, match="would both become"):
        repaired_keys(["lm_head.lora_A.weight", "base_model.model.lm_head.lora_A.weight"])


def test_repair_never_overwrites(case: Case, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("precious")
    with pytest.raises(CannotWriteError, match="exists already"):
        repair_keys(case.adapter, tmp_path / "there")
    assert (tmp_path / "there").read_text() == "precious"


def test_an_adapter_of_another_model(dense: Case, tmp_path: Path) -> None:
    key_a, key_b = lora_keys("transformer.h.0.attn.c_attn")
    save_file({key_a: torch.ones(2, 4), key_b: torch.ones(4, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(BadDataError, match=r"has no transformer\.h\.0\.attn\.c_attn to change"):
        rebuild_configuration(tmp_path / "a.safetensors", dense.student)
    with pytest.raises(MissingInputError):
        rebuild_configuration(tmp_path / "b.safetensors")
