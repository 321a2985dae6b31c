"""A part counts only when every byte is as it was written; parts become one file with little memory, in any order."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.parts import (
    PartContent,
    Parts,
    find_fault,
    part_path,
    part_tensors,
    read_record,
    reject_part,
    verify_part,
    write_part,
)
from moe_svd_distill.execution.planned import Planned, write_tensors
from tests.support.workload import consolidated

KEY = "ab" * 32


def content() -> PartContent:
    tensors = {
        "layers.0.lora_B": torch.arange(12.0).reshape(4, 3).T,  # not contiguous
        "layers.0.lora_A": torch.ones(3, 5, dtype=torch.bfloat16, requires_grad=True),
        "a": torch.tensor(2.5),
    }
    return tensors, {"fate": {"q": "projected", "ü": None}, "ranks": {10: (1, 2), 9: []}, "loss": 0.1}


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return write_part(tmp_path, KEY, *content())


def test_what_is_written_is_read(part: Path) -> None:
    assert verify_part(part, KEY)
    tensors = part_tensors(part)
    assert list(tensors) == ["a", "layers.0.lora_A", "layers.0.lora_B"]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in content()[0].items())
    assert read_record(part) == {"fate": {"q": "projected", "ü": None}, "ranks": {"10": [1, 2], "9": []}, "loss": 0.1}


def test_same_bytes_whatever_the_order(part: Path, tmp_path: Path) -> None:
    tensors, record = (dict(reversed(list(facts.items()))) for facts in content())
    (tmp_path / "other").mkdir()
    again = write_part(tmp_path / "other", KEY, tensors, record)
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
    for read in (read_record, part_tensors):
        with pytest.raises(BadDataError, match=r"bytes, expected .*Run the same command again"):
            read(part)


@pytest.mark.parametrize("wrong", [{"key": object()}, {"key": {1, 2}}])
def test_records_that_json_cannot_hold_leave_nothing(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        write_part(tmp_path, KEY, {}, wrong)
    assert not list(tmp_path.iterdir())


def write(folder: Path, *names: str) -> Path:
    generator = torch.Generator().manual_seed(len(names[0]))
    tensors = {name: torch.randn(3, 4, generator=generator) for name in names}
    return write_part(folder, hashlib.sha256(names[0].encode()).hexdigest(), tensors, {})


def test_one_file_whatever_the_order(tmp_path: Path) -> None:
    parts = [write(tmp_path, "b", "d"), write(tmp_path, "aaa", "e"), write(tmp_path, "cc")]
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    digest = consolidated(parts, first)
    assert digest == consolidated(parts[::-1], second) == hashlib.sha256(first.read_bytes()).hexdigest()
    with safe_open(first, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.offset_keys()) == ["aaa", "b", "cc", "d", "e"]
    library = tmp_path / "library.safetensors"
    save_file(load_file(first), library, {"format": "pt"})
    assert library.read_bytes() == first.read_bytes()


def test_a_tensor_of_another_shape_or_type_than_planned(tmp_path: Path) -> None:
    for made in (torch.ones(2, 3), torch.ones(3, 2, dtype=torch.float16)):
        with pytest.raises(ValueError, match="planned"):
            write_tensors({"a": Planned((3, 2), torch.float32, partial(torch.clone, made))}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_in_two_parts(tmp_path: Path) -> None:
    parts = [write(tmp_path, "a", "x"), write(tmp_path, "bb", "x")]
    with pytest.raises(BadDataError, match="Tensor x is in two parts"):
        Parts(parts)


def test_a_part_that_was_damaged_meanwhile(tmp_path: Path) -> None:
    part = write(tmp_path, "a")
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(BadDataError, match="Run the same command again"):
        Parts([part])
    part.unlink()
    with pytest.raises(BadDataError, match=r"is not there\. Run the same command again"):
        Parts([part])


_MEASURE = """
import json, sys, threading, time
from pathlib import Path
from tests.support.workload import consolidated
import torch

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

torch.ones(3).mul(2)
before, peak, stop = anonymous(), 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
consolidated([Path(name) for name in sys.argv[2:]], Path(sys.argv[1]))
stop = True
thread.join()
print(json.dumps({"growth": peak - before, "size": Path(sys.argv[1]).stat().st_size}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure")
def test_memory_is_bounded(tmp_path: Path) -> None:
    parts = []
    for number in range(5):
        tensors = {f"layers.{number}.{name}": torch.full((16 << 18,), float(number)) for name in "abcd"}  # 64 MiB
        parts.append(write_part(tmp_path, f"{number:064x}", tensors, {}))
    output = tmp_path / "out"
    command = [sys.executable, "-c", _MEASURE, str(output), *map(str, parts)]
    root = Path(__file__).parents[2]
    seen = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)
    assert seen["size"] > 300 << 20
    assert seen["growth"] < 60 << 20


def test_nothing_is_written_that_is_no_number(tmp_path: Path) -> None:
    good, bad = torch.ones(3, 2), torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]])
    write_tensors({"a": Planned((3, 2), torch.float32, partial(torch.clone, good))}, tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    planned = {
        name: Planned(tuple(t.shape), t.dtype, partial(torch.clone, t)) for name, t in {"a": good, "b": bad}.items()
    }
    with pytest.raises(BadDataError, match=r"b of out would hold 2 NaN or Inf of 4 values in torch\.float32"):
        write_tensors(planned, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
