"""Quantised models through the whole pipeline: an FP8 teacher, and a student that is quantised itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.cli.main import program
from moe_svd_distill.pipeline.distill import Adapter, distill
from moe_svd_distill.pipeline.pair import open_model, open_pair
from tests.support.models import saved
from tests.support.pairs import delta, recipe_for, records, run_units
from tests.support.quantised import FP8, SCHEMES, declare, in_float8, plain_copy, quantised_copy

WIDE = {"hidden_size": 48, "num_hidden_layers": 3, "num_experts": 6, "moe_intermediate_size": 24}
FULL_RANK = {"rank": "full", "head_rank": "full"}


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Hub name to the product of its pair."""
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix, a, b = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
    return {
        key.removeprefix(prefix).replace(".lora_A", ""): tensors[key.replace(a, b)].float() @ tensors[key].float()
        for key in tensors
        if key.endswith(a)
    }


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Of all deltas together, relative."""
    assert found.keys() == wanted.keys()
    difference = sum(float((found[key] - wanted[key]).square().sum()) for key in wanted)
    return (difference / sum(float(tensor.square().sum()) for tensor in wanted.values())) ** 0.5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    teacher = saved("qwen3_moe", folder / "teacher", seed=1, **WIDE)
    student = saved("qwen3_moe", folder / "student", seed=2, **WIDE)
    return {
        "teacher": teacher,
        "student": student,
        "teacher_fp8": in_float8(teacher, folder / "teacher_fp8"),
        "student_fp8": in_float8(student, folder / "student_fp8"),
    }


@pytest.fixture(scope="module")
def adapter(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """From the FP8 teacher, by worker processes."""
    out = tmp_path_factory.mktemp("adapter") / "out"
    return distill(recipe_for(models["teacher_fp8"], models["student"], out, **FULL_RANK))


def test_the_pair_opens_and_has_the_same_shapes(models: dict[str, Path]) -> None:
    plain = open_model(str(models["teacher"]))
    with open_pair(str(models["teacher_fp8"]), str(models["student_fp8"])) as pair:
        assert pair.teacher.shapes == plain.shapes
        assert pair.teacher.checkpoint.quantisation == "fp8: float8 in blocks of 32×24"
        assert not pair.teacher.layout.without_role
        for name in pair.teacher.checkpoint:
            read, wanted = pair.teacher.checkpoint.read(name).float(), plain.checkpoint.read(name).float()
            assert float((read - wanted).norm()) <= 0.05 * float(wanted.norm())


def test_an_fp8_teacher_gives_nearly_the_adapter_of_its_original(
    models: dict[str, Path], adapter: Adapter, tmp_path: Path
) -> None:
    original = run_units(recipe_for(models["teacher"], models["student"], tmp_path / "out", **FULL_RANK))
    found = deltas(adapter.folder)
    wanted = {name: delta(original, name) for name, row in records(original).items() if row["fate"] == "lora"}
    assert 0 < distance(found, {name: wanted[name] for name in found}) < 0.03
    fates = {name: row["fate"] for name, row in records(original).items()}
    assert fates == {row["name"]: row["fate"] for row in adapter.record.content["tensors"]}
    stored = (models["teacher_fp8"] / "model.safetensors").stat().st_size
    assert stored * 0.8 < adapter.record.content["teacher"]["bytes"] < stored


def test_the_delta_of_a_quantised_student_starts_from_its_own_numbers(models: dict[str, Path], tmp_path: Path) -> None:
    """Student in FP8, teacher the plain model it was quantised from: the adapter is the error of quantising."""
    contents = run_units(recipe_for(models["student"], models["student_fp8"], tmp_path / "out", **FULL_RANK))
    plain, coded = open_model(str(models["student"])).checkpoint, open_model(str(models["student_fp8"])).checkpoint
    changed = [name for name, row in records(contents).items() if row["fate"] == "lora" and "_proj" in name]
    assert len(changed) == 3 * (4 + 3 * 6)
    for name in changed:
        wanted = plain.read(name).float() - coded.read(name).float()
        assert float(wanted.norm()) > 0
        assert float((delta(contents, name) - wanted).norm()) <= 0.02 * float(wanted.norm()), name


@pytest.mark.parametrize(
    "quantisation",
    [
        FP8,
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128, "strategy": "group"}}
            },
        },
    ],
    ids=lambda quantisation: quantisation["quant_method"],
)
def test_peft_loads_the_adapter_whatever_the_student_declares(
    quantisation: dict[str, Any], models: dict[str, Path], adapter: Adapter, tmp_path: Path
) -> None:
    expected = check_loads(adapter.folder, models["student"])
    shutil.copy(models["student"] / "config.json", tmp_path)
    declare(tmp_path, quantisation)
    assert check_loads(adapter.folder, tmp_path) == expected
    assert check_loads(adapter.folder, json.loads((tmp_path / "config.json").read_text())) == expected


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "fp8"])
def test_every_format_of_a_teacher_and_of_a_student(scheme: str, models: dict[str, Path], tmp_path: Path) -> None:
    """A whole run; and its changes are those of the same numbers stored plainly, bit for bit."""
    coded = [quantised_copy(models[name], tmp_path / name, scheme) for name in ("teacher", "student")]
    plain = [plain_copy(folder, tmp_path / f"{folder.name}_plain") for folder in coded]
    assert open_model(str(coded[0])).shapes == open_model(str(models["teacher"])).shapes
    found, wanted = (run_units(recipe_for(*pair, tmp_path / "none", **FULL_RANK)) for pair in (coded, plain))
    for (_, mine), (_, other) in zip(found, wanted, strict=True):
        assert mine.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(mine.tensors[name], other.tensors[name]) for name in mine.tensors)
    adapter = distill(recipe_for(*coded, tmp_path / "out", **FULL_RANK))
    done = {name: row for name, row in records(found).items() if row["fate"] == "lora"}
    assert distance(deltas(adapter.folder), {name: delta(found, name) for name in deltas(adapter.folder)}) < 0.01
    assert len(deltas(adapter.folder)) == len(done)


def test_inspect_says_the_format(models: dict[str, Path]) -> None:
    def facts(name: str) -> Any:
        done = CliRunner().invoke(program, ["inspect", str(models[name]), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.output)

    assert facts("teacher_fp8")["quantisation"] == "fp8: float8 in blocks of 32×24"
    assert facts("teacher")["quantisation"] is None
    assert facts("teacher_fp8")["tensors"] == facts("teacher")["tensors"]
    assert facts("teacher_fp8")["bytes"] < facts("teacher")["bytes"]


def test_what_config_json_says_otherwise_of_experts_is_in_the_record(models: dict[str, Path], tmp_path: Path) -> None:
    teacher = shutil.copytree(models["teacher_fp8"], tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text()) | {"expert_dtype": "fp4"}
    (teacher / "config.json").write_text(json.dumps(config))
    record = distill(recipe_for(teacher, models["student"], tmp_path / "out", **FULL_RANK)).record.content
    (note,) = record["teacher"]["notes"]
    assert note.startswith("config.json says expert_dtype fp4, but ")
    assert record["student"]["notes"] == []
