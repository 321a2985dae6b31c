"""The file of hidden states: readable by the library, and damaged nowhere without notice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.streaming.states_file import StatesFile, find_fault, write_states

BODY = {"key": "k", "done": 3}


def written(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, torch.Tensor]:
    states = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    path = folder / "states.safetensors"
    write_states(path, BODY, 5, states.split(2))
    return path, states


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path, states = written(tmp_path, dtype)
    assert find_fault(path, BODY) is None
    file = StatesFile(path)
    assert torch.equal(file.rows(slice(1, 4)), states[1:4])
    assert torch.equal(file.rows(slice(None)), states)
    with safe_open(str(path), framework="pt") as opened:
        assert torch.equal(opened.get_tensor("states"), states)
        assert len(opened.metadata()) == 1


def test_a_change_in_place_stays_in_memory(tmp_path: Path) -> None:
    path, states = written(tmp_path)
    StatesFile(path).rows(slice(None)).zero_()
    assert torch.equal(StatesFile(path).rows(slice(None)), states)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path, data: st.DataObject) -> None:
    path, _ = written(tmp_path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert find_fault(path, BODY) is not None


def test_another_pass_is_a_fault(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    assert find_fault(path, {**BODY, "key": "other"}) == "its key is 'k', expected 'other'"


def test_too_few_states_are_not_published(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 sequences were written"):
        write_states(tmp_path / "states", BODY, 5, torch.zeros(4, 3, 4).split(2))
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"something else")
    with pytest.raises(BadDataError, match="cannot be used"):
        StatesFile(path)
