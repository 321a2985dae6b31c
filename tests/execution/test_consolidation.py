"""The adapter is put together from its parts with little memory, and does not depend on their order."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.consolidation import consolidate
from moe_svd_distill.execution.parts import PartContent, write_part


def write(folder: Path, *names: str) -> Path:
    generator = torch.Generator().manual_seed(len(names[0]))
    tensors = {name: torch.randn(3, 4, generator=generator) for name in names}
    return write_part(folder, hashlib.sha256(names[0].encode()).hexdigest(), PartContent(tensors, {}))


def test_one_file_whatever_the_order(tmp_path: Path) -> None:
    parts = [write(tmp_path, "b", "d"), write(tmp_path, "aaa", "e"), write(tmp_path, "cc")]
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    digest = consolidate(parts, first)
    assert digest == consolidate(parts[::-1], second) == hashlib.sha256(first.read_bytes()).hexdigest()
    with safe_open(first, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.offset_keys()) == ["aaa", "b", "cc", "d", "e"]
    library = tmp_path / "library.safetensors"
    save_file(load_file(first), library, {"format": "pt"})
    assert library.read_bytes() == first.read_bytes()


def test_renaming_leaving_out_and_scaling(tmp_path: Path) -> None:
    parts = [write(tmp_path, "b", "d"), write(tmp_path, "cc")]
    output = tmp_path / "out.safetensors"
    consolidate(
        parts,
        output,
        rename=lambda name: None if name == "d" else f"base.{name}",
        scale=lambda name, tensor: tensor * 2 if name == "base.b" else tensor,
    )
    loaded, part = load_file(output), load_file(parts[0])
    assert sorted(loaded) == ["base.b", "base.cc"]
    assert torch.equal(loaded["base.b"], part["b"] * 2)
    assert torch.equal(loaded["base.cc"], load_file(parts[1])["cc"])


def test_scaling_by_one_changes_no_byte(tmp_path: Path) -> None:
    parts = [write(tmp_path, "b", "d"), write(tmp_path, "cc")]
    plain = consolidate(parts, tmp_path / "plain")
    assert consolidate(parts, tmp_path / "scaled", scale=lambda name, tensor: tensor) == plain


def test_scaling_may_not_change_the_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scaling changed b from torch.float32 \(3, 4\)"):
        consolidate([write(tmp_path, "b")], tmp_path / "out", scale=lambda name, tensor: tensor[:1])
    assert not (tmp_path / "out").exists()


def test_a_name_in_two_parts(tmp_path: Path) -> None:
    parts = [write(tmp_path, "a", "x"), write(tmp_path, "bb", "x")]
    with pytest.raises(BadDataError, match="Tensor x is in two parts"):
        consolidate(parts, tmp_path / "out")
    with pytest.raises(BadDataError, match="Tensor y is in two parts"):
        consolidate(parts[:1], tmp_path / "out", rename=lambda name: "y")


def test_a_part_that_was_damaged_meanwhile(tmp_path: Path) -> None:
    part = write(tmp_path, "a")
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(BadDataError, match="Run the same command again"):
        consolidate([part], tmp_path / "out")
    part.unlink()
    with pytest.raises(BadDataError, match="cannot be read"):
        consolidate([part], tmp_path / "out")
    assert not list(tmp_path.iterdir())


_MEASURE = """
import json, sys, threading, time
from pathlib import Path
from moe_svd_distill.execution.consolidation import consolidate
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
scale = (lambda name, tensor: tensor * 0.5) if sys.argv[1] == "scaled" else None
consolidate([Path(name) for name in sys.argv[3:]], Path(sys.argv[2]), scale=scale)
stop = True
thread.join()
print(json.dumps({"growth": peak - before, "size": Path(sys.argv[2]).stat().st_size}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure")
def test_memory_is_bounded(tmp_path: Path) -> None:
    parts = []
    for number in range(5):
        tensors = {f"layers.{number}.{name}": torch.full((16 << 18,), float(number)) for name in "abcd"}  # 64 MiB
        parts.append(write_part(tmp_path, f"{number:064x}", PartContent(tensors, {})))
    for how, limit in (("plain", 30), ("scaled", 60)):
        output = tmp_path / how
        command = [sys.executable, "-c", _MEASURE, how, str(output), *map(str, parts)]
        seen = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        output.unlink()
        assert seen["size"] > 300 << 20
        assert seen["growth"] < limit << 20, how
