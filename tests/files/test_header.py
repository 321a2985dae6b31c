"""The header parser: what it accepts is right, and whatever else it is given, it explains."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError
from moe_svd_distill.files.dtypes import BYTES_PER_ELEMENT, TORCH_NAMES
from moe_svd_distill.files.header import MAX_HEADER_BYTES, Header, header_of, read_header
from tests.checkpoints.builders import entry, safetensors_bytes, tiny_tensors

ONE = {"a": entry("F32", [2], 0, 8)}


def of(raw: bytes, path: Path = Path("model.safetensors")) -> Header:
    """Read a header from bytes, through a real file."""
    path.write_bytes(raw)
    return read_header(path)


def test_agrees_with_the_library_on_a_real_file(tmp_path: Path) -> None:
    tensors = tiny_tensors() | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "mask": torch.tensor([True])}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert header.file_bytes == len(raw)
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = header.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert info.bytes == tensor.nbytes
        expected = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert raw[info.offset : info.offset + info.bytes] == expected


ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "found 0 bytes"),
    "seven bytes": (b"\x01\0\0\0\0\0\0", "found 7 bytes"),
    "length beyond the file": (safetensors_bytes(ONE, length=10_000), "cut off"),
    "length of 2**64-1": (b"\xff" * 8 + b"{}", "at most"),
    "length over the limit": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "at most"),
    "header of no bytes": (safetensors_bytes(b""), "does not begin"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x08builtins", "at most"),
    "zip of a .bin": (b"PK\x03\x04" + bytes(60), "cut off"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
    "html page": (b"<!DOCTYPE html><html></html>", "at most"),
    "not JSON": (safetensors_bytes(b"{'a': 1}"), "not valid JSON"),
    "cut JSON": (safetensors_bytes(b'{"a": {"dtype": "F32"'), "not valid JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff\xfe": 1}'), "not UTF-8"),
    "list": (safetensors_bytes(b"[1, 2]"), "does not begin"),
    "space before": (safetensors_bytes(b" {}"), "does not begin"),
    "text after": (safetensors_bytes(b"{} {}"), "not valid JSON"),
    "nested deeply": (safetensors_bytes(b'{"a":' * 100_000), "nested too deeply"),
    "number of 10,000 digits": (safetensors_bytes(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "duplicate tensor": (
        safetensors_bytes(f'{{"a": {json.dumps(ONE["a"])}, "a": {json.dumps(ONE["a"])}}}'.encode(), bytes(8)),
        "there twice",
    ),
    "duplicate key in an entry": (
        safetensors_bytes(b'{"a": {"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "there twice",
    ),
    "metadata that is a list": (safetensors_bytes({"__metadata__": []} | ONE, bytes(8)), "__metadata__"),
    "metadata with a number": (safetensors_bytes({"__metadata__": {"a": 1}} | ONE, bytes(8)), "__metadata__"),
    "entry that is text": (safetensors_bytes({"a": "F32"}), "expected an object"),
    "entry that is null": (safetensors_bytes({"a": None}), "expected an object"),
    "no dtype": (safetensors_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "has dtype None"),
    "unknown dtype": (safetensors_bytes({"a": entry("F128", [2], 0, 32)}, bytes(32)), "has dtype 'F128'"),
    "packed dtype F4": (safetensors_bytes({"a": entry("F4", [2], 0, 1)}, b"\0"), "has dtype 'F4'"),
    "dtype as a list": (safetensors_bytes({"a": entry(["F32"], [2], 0, 8)}, bytes(8)), "has dtype"),  # type: ignore[arg-type]
    "negative size": (safetensors_bytes({"a": entry("F32", [-2, -1], 0, 8)}, bytes(8)), "has shape"),
    "fractional size": (safetensors_bytes({"a": entry("F32", [2.0], 0, 8)}, bytes(8)), "has shape"),  # type: ignore[list-item]
    "true as a size": (safetensors_bytes({"a": entry("F32", [True, 2], 0, 8)}, bytes(8)), "has shape"),
    "shape that is text": (safetensors_bytes({"a": {**ONE["a"], "shape": "2"}}, bytes(8)), "has shape"),
    "a thousand dimensions": (safetensors_bytes({"a": entry("F32", [1] * 1000, 0, 4)}, bytes(4)), "has shape"),
    "size that overflows 64 bits": (
        safetensors_bytes({"a": entry("F32", [2**32, 2**32], 0, 0)}),
        "more than any computer can hold",
    ),
    "overflow hidden by a zero": (
        safetensors_bytes({"a": entry("F32", [0, 2**40, 2**40], 0, 0)}),
        "more than any computer can hold",
    ),
    "one offset": (safetensors_bytes({"a": {**ONE["a"], "data_offsets": [0]}}, bytes(8)), "data_offsets"),
    "negative offset": (safetensors_bytes({"a": entry("F32", [2], -8, 0)}, bytes(8)), "data_offsets"),
    "offsets backwards": (safetensors_bytes({"a": entry("F32", [2], 8, 0)}, bytes(8)), "has -8 bytes"),
    "bytes against the shape": (safetensors_bytes({"a": entry("F32", [3], 0, 8)}, bytes(8)), "expected 12"),
    "bytes against the dtype": (safetensors_bytes({"a": entry("BF16", [2], 0, 8)}, bytes(8)), "expected 4"),
    "file cut off": (safetensors_bytes(ONE, bytes(7)), "cut off"),
    "header without its data": (safetensors_bytes(ONE), "cut off"),
    "data after the last tensor": (safetensors_bytes(ONE, bytes(9)), "longer than its header says"),
    "gap at the beginning": (safetensors_bytes({"a": entry("F32", [2], 4, 12)}, bytes(12)), "gap"),
    "gap in the middle": (
        safetensors_bytes({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, bytes(20)),
        "gap",
    ),
    "overlap": (
        safetensors_bytes({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
        "overlaps",
    ),
    "the same bytes twice": (
        safetensors_bytes({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, bytes(8)),
        "overlaps",
    ),
    "NUL in a name": (safetensors_bytes({"a\0b": ONE["a"]}, bytes(8)), "with the name"),
    "../ in a name": (safetensors_bytes({"../../etc/passwd": ONE["a"]}, bytes(8)), "with the name"),
    "escape sequence in a name": (safetensors_bytes({"\x1b[2Ja": ONE["a"]}, bytes(8)), "with the name"),
    "half a surrogate pair in a name": (
        safetensors_bytes(b'{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "with the name",
    ),
    "empty name": (safetensors_bytes({"": ONE["a"]}, bytes(8)), "with the name"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused_in_one_line_that_names_the_file(attack: str, tmp_path: Path) -> None:
    raw, reason = ATTACKS[attack]
    with pytest.raises(BadDataError) as caught:
        of(raw, tmp_path / "model.safetensors")
    message = str(caught.value)
    assert reason in message
    assert "model.safetensors" in message
    assert message.isprintable()
    assert len(message) < 1000


def test_files_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="not there"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(BadDataError, match="not a regular file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(BadDataError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*BYTES_PER_ELEMENT, "F4"]) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    },
)
headers = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | json_values, max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | headers.map(lambda header: safetensors_bytes(header)), st.integers(0, 60))
def test_any_bytes_are_read_or_explained(raw: bytes, extra: int) -> None:
    raw += bytes(extra)
    try:
        length = int.from_bytes(raw[:8], "little")
        header = header_of(raw[: 8 + length], Path("x"), len(raw))
    except DistillError:
        return
    assert sum(info.bytes for info in header.tensors.values()) + 8 + length == len(raw)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_explained_or_read_as_the_library_reads_it(data: st.DataObject, tmp_path: Path) -> None:
    whole = safetensors_bytes(
        {
            "__metadata__": {"format": "pt"},
            "a.weight": entry("BF16", [2, 3], 0, 12),
            "b.weight": entry("F32", [1], 12, 16),
            "c.weight": entry("I64", [0], 16, 16),
        },
        bytes(16),
    )
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        change = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if change == "set":
            raw[place] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789"[]{},:')))
        elif change == "cut":
            del raw[place : place + data.draw(st.integers(1, 4))]
        else:
            raw[place:place] = data.draw(st.binary(min_size=1, max_size=4))
        if not raw:
            break
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except DistillError:
        return
    with safe_open(path, framework="pt") as reference:
        names = list(reference.keys())
        assert sorted(names) == sorted(header.tensors)
        for name in names:
            assert tuple(reference.get_slice(name).get_shape()) == header.tensors[name].shape
            assert reference.get_slice(name).get_dtype() == header.tensors[name].dtype


def test_every_dtype_of_the_allow_list_has_a_torch_dtype_of_that_size() -> None:
    sizes: dict[str, Any] = {name: getattr(torch, torch_name).itemsize for name, torch_name in TORCH_NAMES.items()}
    assert sizes == BYTES_PER_ELEMENT
