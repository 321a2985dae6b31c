"""A folder of a store: what is too large for a small file, and files that change."""

from __future__ import annotations

import uuid

import fsspec
import pytest

from moe_svd_distill.checkpoints.remote import source as module
from moe_svd_distill.checkpoints.remote.source import StoreSource
from moe_svd_distill.errors import BadDataError


@pytest.fixture
def address() -> str:
    place = f"/{uuid.uuid4().hex}/model"
    fsspec.filesystem("memory").pipe_file(f"{place}/tokenizer.json", b"{}" * 50)
    return f"memory:/{place}"


def test_a_large_file_is_refused_and_not_cut(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = StoreSource(address)
    assert source.small_file("tokenizer.json") == b"{}" * 50
    monkeypatch.setattr(module, "MAX_JSON_BYTES", 99)
    with pytest.raises(BadDataError, match=r"'tokenizer.json' of .* has 100 bytes \(expected at most 99\)"):
        source.small_file("tokenizer.json")


def test_files_that_changed_are_refused(address: str) -> None:
    revision = StoreSource(address).revision
    assert StoreSource(address, revision).revision == revision
    fsspec.filesystem("memory").pipe_file(f"{address.removeprefix('memory:/')}/tokenizer.json", b"{}")
    with pytest.raises(BadDataError, match="not those that were opened any more"):
        StoreSource(address, revision)
