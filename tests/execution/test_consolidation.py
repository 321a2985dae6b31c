"""The adapter is put together from its parts with little memory, and does not depend on their order."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.consolidation import Parts, Planned, write_tensors
from moe_svd_distill.execution.parts import PartContent, write_part
from tests.execution.workload import consolidated


def write(folder: Path, *names: str) -> Path:
    generator = torch.Generator().manual_seed(len(names[0]))
    tensors = {name: torch.randn(3, 4, generator=generator) for name in names}
    return write_part(folder, hashlib.sha256(names[0].encode()).hexdigest(), PartContent(tensors, {}))


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
from tests.execution.workload import consolidated
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
        parts.append(write_part(tmp_path, f"{number:064x}", PartContent(tensors, {})))
    output = tmp_path / "out"
    command = [sys.executable, "-c", _MEASURE, str(output), *map(str, parts)]
    root = Path(__file__).parents[2]
    seen = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)
    assert seen["size"] > 300 << 20
    assert seen["growth"] < 60 << 20
