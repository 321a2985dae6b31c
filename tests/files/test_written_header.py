"""What is written is what the library would write."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.files.dtypes import dtype_code, tensor_bytes
from moe_svd_distill.files.header import encode_header, lay_out, packed_header
from moe_svd_distill.files.reading import opened, read_pieces

_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.int16,
    torch.uint16, torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.float64, torch.int64,
    torch.uint64,
]  # fmt: skip
_NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


def encode(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    slots = lay_out((name, dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())
    return encode_header(slots, metadata) + b"".join(bytes(tensor_bytes(tensors[slot.name])) for slot in slots)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(_NAMES, st.tuples(st.sampled_from(_DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=6),
    st.dictionaries(_NAMES, st.text(max_size=8), max_size=1),
)
def test_same_bytes_as_the_library(table: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]) -> None:
    tensors = {}
    for name, (dtype, shape) in table.items():
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape) * dtype.itemsize,))
        tensors[name] = raw.to(torch.uint8).view(dtype).reshape(shape)
    assert encode(tensors, metadata) == save(tensors, metadata or None)


def test_two_metadata_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="more than one metadata key"):
        encode_header([], {"a": "", "b": ""})


def test_half_a_surrogate_pair_is_copied_and_not_written() -> None:
    content = json.loads(b'{"__metadata__":{"a":"\\ud800"}}')
    assert json.loads(packed_header(content, copied=True)[8:]) == content
    with pytest.raises(UnicodeEncodeError):
        packed_header(content)


def test_complex_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match="complex64"):
        dtype_code(torch.complex64)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    with opened(path) as descriptor, pytest.raises(BadDataError, match="found 10 bytes, expected 15"):
        list(read_pieces(descriptor, path, 5, 15))


def test_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3, dtype=torch.int8), "é\n": torch.zeros(0, 4)}
    (tmp_path / "file").write_bytes(encode(tensors, {"format": "pt"}))
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
