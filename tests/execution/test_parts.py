"""A part counts only when every byte of it is as it was written."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.parts import (
    PartContent,
    find_fault,
    open_part,
    part_path,
    read_record,
    reject_part,
    verify_part,
    write_part,
)

KEY = "ab" * 32


def content() -> PartContent:
    tensors = {
        "layers.0.lora_B": torch.arange(12.0).reshape(4, 3).T,  # not contiguous
        "layers.0.lora_A": torch.ones(3, 5, dtype=torch.bfloat16, requires_grad=True),
        "a": torch.tensor(2.5),
    }
    return PartContent(tensors, {"fate": {"q": "projected", "ü": None}, "ranks": {10: (1, 2), 9: []}, "loss": 0.1})


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return write_part(tmp_path, KEY, content())


def test_what_is_written_is_read(part: Path) -> None:
    assert verify_part(part, KEY)
    with open_part(part) as tensors:
        assert list(tensors) == ["a", "layers.0.lora_A", "layers.0.lora_B"]
        assert len(tensors) == 3
        assert all(torch.equal(tensors[name], tensor) for name, tensor in content().tensors.items())
        with pytest.raises(KeyError):
            tensors["b"]
    assert read_record(part) == {"fate": {"q": "projected", "ü": None}, "ranks": {"10": [1, 2], "9": []}, "loss": 0.1}


def test_same_bytes_whatever_the_order(part: Path, tmp_path: Path) -> None:
    other = content()
    tensors = dict(reversed(list(other.tensors.items())))
    record = dict(reversed(list(other.record.items())))
    (tmp_path / "other").mkdir()
    again = write_part(tmp_path / "other", KEY, PartContent(tensors, record))
    assert again.read_bytes() == part.read_bytes()


def test_colleagues_may_read_it_and_nothing_else_is_left(part: Path) -> None:
    assert stat.S_IMODE(part.stat().st_mode) == 0o644
    assert list(part.parent.iterdir()) == [part]
    assert part == part_path(part.parent, KEY)


def test_there_is_one_metadata_key(part: Path) -> None:
    with safe_open(part, framework="pt") as file:
        assert list(file.metadata()) == ["moe_svd_distill"]


def test_an_absent_part(tmp_path: Path) -> None:
    assert not verify_part(part_path(tmp_path, KEY), KEY)
    with pytest.raises(BadDataError):
        read_record(part_path(tmp_path, KEY))


def test_every_damaged_byte_is_found(part: Path) -> None:
    """One bit of each byte of the file: the length, the header, its padding and the tensors."""
    good = part.read_bytes()
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 1 << (position * 5 % 8)
        part.write_bytes(data)
        assert find_fault(part, KEY) is not None, f"byte {position}"


def test_every_truncation_and_zero_tail_is_found(part: Path) -> None:
    good = part.read_bytes()
    for length in range(0, len(good), 7):
        part.write_bytes(good[:length])
        assert find_fault(part, KEY) is not None, f"truncated to {length}"
        if any(good[length:]):
            part.write_bytes(good[:length] + bytes(len(good) - length))
            assert find_fault(part, KEY) is not None, f"zeros from {length}"


def test_a_part_of_another_unit(part: Path) -> None:
    assert find_fault(part, "cd" * 32) == f"it belongs to unit {KEY}"
    assert find_fault(part) is None


def test_bad_parts_are_kept_under_other_names(part: Path) -> None:
    for number in (1, 2, 3):
        part.write_bytes(b"damaged %d" % number)
        assert not verify_part(part, KEY)
        assert part.with_name(f"{part.name}.rejected-{number}").read_bytes() == b"damaged %d" % number
    part.write_bytes(b"")
    assert reject_part(part).name.endswith(".rejected-4")


def test_damaged_parts_are_explained(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-1])
    for read in (read_record, open_part):
        with pytest.raises(BadDataError, match=r"bytes, expected .*Run the same command again"):
            read(part)


@pytest.mark.parametrize("wrong", [{"key": object()}, {"key": {1, 2}}])
def test_records_that_json_cannot_hold_leave_nothing(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        write_part(tmp_path, KEY, PartContent({}, wrong))
    assert not list(tmp_path.iterdir())
