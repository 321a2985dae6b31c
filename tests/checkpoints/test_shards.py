"""The index, the shards and their headers have to agree."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import MissingInputError
from tests.checkpoints.builders import read_index, shard_name, tiny_tensors, write_index, write_model
from tests.support.refusals import refusal

FIRST, SECOND = shard_name(1, 2), shard_name(2, 2)


def test_missing_shard(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2)
    (tmp_path / SECOND).unlink()
    error = refusal(tmp_path, MissingInputError)
    assert SECOND in error.what
    assert "missing" in error.what
    assert error.exit_code == 66


def test_missing_shard_without_an_index(tmp_path: Path) -> None:
    write_model(tmp_path, shards=3, index=False)
    (tmp_path / shard_name(2, 3)).unlink()
    assert (
        f"lacks 1 of 3 shards; the first missing one is '{shard_name(2, 3)}'"
        in refusal(tmp_path, MissingInputError).what
    )


def test_index_that_leaves_out_a_shard(tmp_path: Path) -> None:
    write_model(tmp_path, shards=3)
    weight_map = {name: file for name, file in read_index(tmp_path).items() if file != shard_name(2, 3)}
    write_index(tmp_path, weight_map)
    assert shard_name(2, 3) in refusal(tmp_path, MissingInputError).what


def test_index_puts_a_tensor_into_another_file(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2)
    weight_map = read_index(tmp_path)
    weight_map["model.norm.weight"] = FIRST
    write_index(tmp_path, weight_map)
    error = refusal(tmp_path)
    assert "model.norm.weight" in error.what
    assert f"into '{FIRST}', but it is found in '{SECOND}'" in error.what
    assert error.exit_code == 65


def test_index_and_headers_disagree_both_ways(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2)
    weight_map = read_index(tmp_path)
    del weight_map["model.norm.weight"]
    weight_map["model.nothing.weight"] = FIRST
    write_index(tmp_path, weight_map)
    error = refusal(tmp_path)
    assert "2 faults" in error.what
    assert "'model.nothing.weight' into '" in error.what
    assert "'model.norm.weight' of" in error.what


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2, index=False)
    save_file(tiny_tensors(), tmp_path / SECOND)
    assert "is in two files" in refusal(tmp_path).what


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/../../outside.safetensors",
        "",
        "a\\b",
        "c:x",
        "a\nb",
        7,
        None,
        ["a"],
        ".",
    ],
)
def test_index_that_leads_out_of_the_folder(tmp_path: Path, name: object) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    shutil.copy(folder / FIRST, tmp_path / "outside.safetensors")
    write_index(folder, {**read_index(folder), "extra": name})
    assert "names" in refusal(folder).what


@pytest.mark.parametrize(
    "index", ['{"weight_map": {}}', '{"weight_map": []}', "{}", "[]", "", "{", '{"a":1,"a":2}', "\0"]
)
def test_index_that_is_none(tmp_path: Path, index: str) -> None:
    write_model(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(tmp_path).what


def test_index_with_a_tensor_twice(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}')
    assert "there twice" in refusal(tmp_path).what


def test_shards_of_two_sets(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2, index=False)
    write_model(tmp_path, shards=3, index=False)
    assert "mixes shards of different sets" in refusal(tmp_path).what


def test_shard_with_a_number_beyond_the_last(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2, index=False)
    save_file({"extra": torch.zeros(1)}, tmp_path / shard_name(5, 2))
    assert "with the number 5 of 2" in refusal(tmp_path).what


def test_one_file_and_an_index(tmp_path: Path) -> None:
    write_model(tmp_path, shards=1)
    write_model(tmp_path, shards=2)
    assert "and also" in refusal(tmp_path).what


def test_a_claim_of_a_billion_shards_costs_nothing(tmp_path: Path) -> None:
    write_model(tmp_path, shards=1)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-99999999999.safetensors")
    assert "claims to have" in refusal(tmp_path).what


def test_an_index_that_came_broken_can_be_left_out(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2)
    write_index(tmp_path, read_index(tmp_path) | {"model.nothing.weight": FIRST})
    assert "without model.safetensors.index.json" in refusal(tmp_path).action
    (tmp_path / "model.safetensors.index.json").unlink()
    assert sorted(open_checkpoint(tmp_path)) == sorted(tiny_tensors())


@pytest.mark.parametrize(
    ("prefix", "wrapper", "action"),
    [
        ("_orig_mod.", "torch.compile", "from inside the wrapper"),
        ("module.", "DataParallel", "from inside the wrapper"),
        ("module._orig_mod.", "torch.compile", "from inside the wrapper"),
        ("base_model.model.", "PEFT", "merge_and_unload"),
    ],
)
def test_names_as_a_wrapper_has_them(prefix: str, wrapper: str, action: str, tmp_path: Path) -> None:
    write_model(tmp_path, tensors={prefix + name: tensor for name, tensor in tiny_tensors().items()})
    error = refusal(tmp_path)
    assert f"6 of 6 tensors are named as inside {wrapper}" in error.what
    assert action in error.action


def test_names_of_modules_inside_a_model_that_were_compiled_by_themselves(tmp_path: Path) -> None:
    tensors = {name.replace("layers.0.", "layers.0._orig_mod."): tensor for name, tensor in tiny_tensors().items()}
    write_model(tmp_path, tensors=tensors)
    assert "2 of 6 tensors are named as inside torch.compile" in refusal(tmp_path).what
