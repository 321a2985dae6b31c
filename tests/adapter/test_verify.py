from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_svd_distill.adapter.naming import lora_keys
from moe_svd_distill.adapter.verify import verify
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import BadDataError, MissingInputError, NothingToTransferError
from moe_svd_distill.files.writing import write_json
from tests.adapter.conftest import Case
from tests.support import tiny

Write = Callable[..., Path]
FILE = "adapter_model.safetensors"


def record(folder: Path, **fields: Any) -> Path:
    digest = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    write_json(folder / "run.json", {"adapter_sha256": digest} | fields)
    return folder


def configuration_of(case: Case) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((case.adapter / "adapter_config.json").read_text())
    return content


def zeroed(case: Case, *modules: str) -> dict[str, torch.Tensor]:
    """The adapter with the B of some modules at zero, or of all."""
    keys = {lora_keys(name)[1] for name in modules}
    return {
        key: torch.zeros_like(value) if key in keys or (not modules and "lora_B" in key) else value
        for key, value in case.pairs.items()
    }


def test_a_good_adapter_of_every_make(case: Case, write: Write) -> None:
    folder = record(write(case, case.pairs))
    report = verify(folder, case.student)
    assert report.pairs == len(case.pairs) // 2
    assert (report.zero_pairs, report.scale, report.digest_checked, report.transferred) == ((), 1.0, True, True)
    assert report.load is not None
    assert report.load.keys == len(case.pairs)
    assert report.warnings == ()
    assert report.summary == f"valid: {report.pairs} pairs, 0 of them zero"
    with open_checkpoint(case.student) as student:
        assert verify(folder, student) == report
    assert verify(folder) == report  # the base model named in the configuration is a folder here


def test_without_a_student_or_a_record_the_report_says_what_was_not_checked(case: Case, write: Write) -> None:
    configuration = configuration_of(case) | {"base_model_name_or_path": "organisation/student"}
    report = verify(write(case, case.pairs, configuration))
    assert report.load is None
    assert not report.digest_checked
    assert any("was not checked, because no student was given" in warning for warning in report.warnings)
    assert any("records no digest" in warning for warning in report.warnings)


def test_a_flipped_bit_is_found(case: Case, write: Write) -> None:
    folder = record(write(case, case.pairs))
    content = bytearray((folder / FILE).read_bytes())
    for position in (len(content) - 1, len(content) // 2):
        changed = bytearray(content)
        changed[position] ^= 1
        (folder / FILE).write_bytes(changed)
        with pytest.raises(BadDataError, match="is not the file that was written"):
            verify(folder, case.student)


@pytest.mark.parametrize("part", [0.03, 0.4, 0.9])
def test_a_zero_filled_tail_is_found(case: Case, write: Write, part: float) -> None:
    """What a killed ``save_file`` leaves: the full size, a valid header, and zeros behind."""
    pairs = tiny.random_pairs(case.student, rank=lambda _: 16)
    folder = record(write(case, pairs, tiny.configure(case.student, pairs)))
    content = (folder / FILE).read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    keep = begin + int(part * (len(content) - begin)) + 2
    (folder / FILE).write_bytes(content[:keep] + bytes(len(content) - keep))
    with pytest.raises(BadDataError, match="is not the file that was written"):
        verify(folder, case.student)


def test_a_zero_filled_tail_is_found_without_a_record(dense: Case, write: Write) -> None:
    pairs = tiny.random_pairs(dense.student, rank=lambda _: 16)
    folder = write(dense, pairs, tiny.configure(dense.student, pairs))
    content = (folder / FILE).read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    found = 0
    cuts = range(begin + 102, len(content) - 4096, 4998)
    for keep in cuts:
        (folder / FILE).write_bytes(content[:keep] + bytes(len(content) - keep))
        try:
            verify(folder, dense.student)
        except BadDataError as error:
            found += "not written to the end" in error.what
    assert found > 0.6 * len(cuts)  # a cut at the end of a row cannot be told from a rank padded with zeros


def test_padded_ranks_and_zero_pairs_are_no_broken_tail(dense: Case, write: Write) -> None:
    pairs = {key: value.clone() for key, value in tiny.random_pairs(dense.student, rank=lambda _: 16).items()}
    for key, value in pairs.items():
        if "lora_A" in key:
            value[5:] = 0
        else:
            value[:, 5:] = 0
            value[-8:] = 0
        if "layers.2." in key:
            value.zero_()
    report = verify(write(dense, pairs, tiny.configure(dense.student, pairs)), dense.student)
    assert len(report.zero_pairs) == 7


def test_a_cut_file_is_found(dense: Case, write: Write) -> None:
    folder = write(dense, dense.pairs)
    content = (folder / FILE).read_bytes()
    for keep in (0, 7, 100, len(content) // 2, len(content) - 1):
        (folder / FILE).write_bytes(content[:keep])
        with pytest.raises(BadDataError, match="adapter_model"):
            verify(folder, dense.student)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_found(case: Case, write: Write, value: float) -> None:
    key = lora_keys("model.layers.2.self_attn.o_proj")[1]
    changed = case.pairs[key].clone()
    changed[3, 1] = value
    with pytest.raises(BadDataError, match=r"layers\.2\.self_attn\.o_proj\.lora_B\.weight: 1 of 128 values are NaN"):
        verify(write(case, case.pairs | {key: changed}), case.student)


def test_zero_pairs_are_a_warning_and_nothing_but_zeros_an_error(case: Case, write: Write) -> None:
    name = "model.layers.1.self_attn.o_proj"
    report = verify(record(write(case, zeroed(case, name))), case.student)
    assert report.zero_pairs == (name,)
    assert any(warning.startswith("1 of ") for warning in report.warnings)
    nothing = write(case, zeroed(case))
    with pytest.raises(NothingToTransferError):
        verify(record(nothing), case.student)
    declared = verify(record(nothing, transferred=False), case.student)
    assert declared.summary == "valid, but scaled to zero: nothing was transferred"
    assert not declared.transferred
    with pytest.raises(BadDataError, match="declares that nothing was transferred"):
        verify(record(write(case, case.pairs), transferred=False), case.student)


def test_a_rank_pattern_without_alpha_is_found(case: Case, write: Write) -> None:
    configuration = configuration_of(case) | {"alpha_pattern": {}}
    for folder in (write(case, case.pairs, configuration), record(write(case, case.pairs, configuration))):
        with pytest.raises(BadDataError, match="rank_pattern without alpha_pattern"):
            verify(folder, case.student)
    away = write(case, case.pairs, configuration | {"base_model_name_or_path": "organisation/student"})
    with pytest.raises(BadDataError, match="rank_pattern without alpha_pattern"):
        verify(away)


def test_another_alpha_is_a_warning_in_a_foreign_adapter_and_an_error_in_ours(dense: Case, write: Write) -> None:
    configuration = configuration_of(dense) | {"lora_alpha": 8, "alpha_pattern": {"lm_head": 16}}
    folder = write(dense, dense.pairs, configuration)
    report = verify(folder, dense.student)
    assert report.scale == 2.0
    assert "PEFT multiplies every pair by 2" in report.warnings
    with pytest.raises(BadDataError, match="by 2, expected 1"):
        verify(record(folder), dense.student)
    (folder / "run.json").unlink()
    away = write(dense, dense.pairs, configuration | {"base_model_name_or_path": "organisation/student"})
    assert verify(away).scale == 2.0


def test_missing_extra_and_misspelt_keys_are_found(case: Case, write: Write) -> None:
    key_a, key_b = lora_keys("model.layers.1.self_attn.o_proj")
    without = {key: value for key, value in case.pairs.items() if key not in (key_a, key_b)}
    with pytest.raises(BadDataError, match=r"leaves empty .*layers\.1\.self_attn\.o_proj"):
        verify(write(case, without), case.student)
    half = {key: value for key, value in case.pairs.items() if key != key_b}
    with pytest.raises(BadDataError, match="is missing"):
        verify(write(case, half), case.student)
    extra = dict(zip(lora_keys("model.layers.7.self_attn.q_proj"), (torch.ones(4, 32), torch.ones(32, 4)), strict=True))
    with pytest.raises(BadDataError, match="PEFT would drop"):
        verify(write(case, case.pairs | extra), case.student)
    seeds = {key.replace(".lora_", ".weight.lora_"): value for key, value in case.pairs.items()}
    with pytest.raises(BadDataError, match=r"keeps \.weight before"):
        verify(write(case, seeds), case.student)


def test_integers_are_no_factors(dense: Case, write: Write) -> None:
    key = lora_keys("model.layers.1.self_attn.o_proj")[0]
    with pytest.raises(BadDataError, match="is I32"):
        verify(write(dense, dense.pairs | {key: torch.ones(4, 32, dtype=torch.int32)}), dense.student)


def test_files_that_are_not_there(dense: Case, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="is not a folder"):
        verify(tmp_path / "nowhere", dense.student)
    with pytest.raises(MissingInputError, match="adapter_model"):
        verify(tmp_path, dense.student)
