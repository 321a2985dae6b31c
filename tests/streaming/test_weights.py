"""Every byte once, and of embedding tables the rows that are looked up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint
from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.streaming import Decoder, PassSettings, load_head, stream_states
from moe_svd_distill.streaming.tables import StoredTable, TableRows
from tests.streaming.conftest import LENGTH, Case
from tests.support import architectures, tiny
from tests.support.models import load, saved
from tests.support.quantised import SCHEMES, plain_copy, quantised_copy
from tests.support.quantisers import float8_blocks

Ids = NDArray[np.int64]
SETTINGS = PassSettings(batch_tokens=2 * LENGTH)
CPU = torch.device("cpu")
IDS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each stored tensor is read."""
    counts: Counter[str] = Counter()
    read = Checkpoint.read

    def counting(self: Checkpoint, name: str, **options: Any) -> torch.Tensor:
        counts[name] += 1
        return read(self, name, **options)

    monkeypatch.setattr(Checkpoint, "read", counting)
    return counts


def not_looked_up(checkpoint: Checkpoint, sequences: Ids) -> int:
    """Bytes of the token embeddings that no token of the text needs."""
    table = checkpoint["model.embed_tokens.weight"]
    return (table.shape[0] - len(np.unique(sequences))) * table.bytes // table.shape[0]


def test_every_tensor_is_read_once(case: Case, sequences: Ids, tmp_path: Path, reads: Counter[str]) -> None:
    record = stream_states(case.checkpoint, sequences, tmp_path, SETTINGS).record
    needed = {name: info.bytes for name, info in case.checkpoint.items() if name != "lm_head.weight"}
    assert reads == Counter(dict.fromkeys(needed, 1))
    assert record.bytes_read == record.bytes_needed == sum(needed.values()) - not_looked_up(case.checkpoint, sequences)
    assert record.unused == ()


def test_the_head_reads_the_head(case: Case, reads: Counter[str]) -> None:
    load_head(case.checkpoint)
    assert reads == Counter({"lm_head.weight": 1})


def test_two_devices_read_once(sparse: Case, sequences: Ids, tmp_path: Path, reads: Counter[str]) -> None:
    settings = PassSettings(("cpu", "cpu"), batch_tokens=SETTINGS.batch_tokens)
    stream_states(sparse.checkpoint, sequences, tmp_path, settings)
    assert set(reads.values()) == {1}


def rewritten(
    case: Case, folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **fields: Any
) -> Checkpoint:
    """The model with its tensors changed, in one file, and fields added to its configuration."""
    weights = tiny.hub_weights(case.folder)
    change(weights)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tiny.config_of(case.folder) | fields))
    return open_checkpoint(folder)


def test_a_quantised_model_is_run_with_its_dequantised_weights(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    """Blocks of fp8; the same numbers in a plain checkpoint give the same bits."""
    names = [name for name in sparse.checkpoint if name.endswith("_proj.weight")]

    def quantise(weights: dict[str, torch.Tensor]) -> None:
        for name in names:
            codes, scales = float8_blocks(weights[name].float(), (128, 128))
            weights |= {name: codes, f"{name}_scale_inv": scales}

    declared = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    quantised = rewritten(sparse, tmp_path / "quantised", quantise, quantization_config=declared)
    plain = rewritten(
        sparse, tmp_path / "plain", lambda weights: weights.update({name: quantised.read(name) for name in names})
    )
    expected = stream_states(plain, sequences, tmp_path, SETTINGS)
    result = stream_states(quantised, sequences, tmp_path, SETTINGS)
    assert torch.equal(result.rows(slice(None)), expected.rows(slice(None)))
    stored = sum(info.bytes for name, info in quantised.stored.items() if name != "lm_head.weight")
    stored -= not_looked_up(quantised, sequences)
    assert result.record.bytes_read == result.record.bytes_needed == stored


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "fp8"])
def test_every_format_is_run_with_its_dequantised_weights(scheme: str, sequences: Ids, tmp_path: Path) -> None:
    """DeepSeek-V4 as it is: its own names, FP4 experts beside FP8 attention."""
    model = architectures.saved("deepseek_v4", tmp_path / "m") if scheme == "deepseek_v4" else None
    coded = quantised_copy(model or saved("qwen3_moe", tmp_path / "m"), tmp_path / "coded", scheme)
    plain = open_checkpoint(plain_copy(coded, tmp_path / "plain"))
    quantised = open_checkpoint(coded)
    assert "fp4" in str(quantised.quantisation) or scheme not in ("deepseek_v4", "nvfp4")
    ids = sequences % 64
    expected, result = (stream_states(model, ids, tmp_path, SETTINGS) for model in (plain, quantised))
    assert torch.equal(result.rows(slice(None)), expected.rows(slice(None)))
    assert result.record.bytes_read == result.record.bytes_needed < expected.record.bytes_read


def table(folder: Any) -> tuple[TableRows, Tensor]:
    checkpoint = open_checkpoint(saved("llama", folder / "model"))
    name = "model.embed_tokens.weight"
    return TableRows(checkpoint, name, torch.float32, None), checkpoint.read(name).float()


def test_a_table_is_looked_up_in_its_file(tmp_path: Any) -> None:
    rows, whole = table(tmp_path)
    embedding = nn.Embedding(*whole.shape, padding_idx=3)
    embedding._parameters["weight"] = nn.Parameter(
        StoredTable.of(rows, tuple(whole.shape), torch.float32, CPU), requires_grad=False
    )
    ids = torch.tensor([[3, 5, 5], [7, 3, 1]])
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(embedding, [ids] * 50):
            assert torch.equal(found, whole[ids])
    assert rows.bytes_read == 4 * rows.bytes // len(whole)
    assert (embedding.weight.dtype, embedding.weight.device.type) == (torch.float32, "cpu")
    assert embedding.weight.untyped_storage().nbytes() == 4


def test_a_table_is_for_look_ups_only(tmp_path: Any) -> None:
    rows, whole = table(tmp_path)
    stored = StoredTable.of(rows, tuple(whole.shape), torch.float32, CPU)
    with pytest.raises(IncompatiblePairError, match="something else than a look-up"):
        torch.ones(1, whole.shape[0]) @ stored


def test_a_decoder_holds_no_table(tmp_path: Any) -> None:
    decoder = Decoder(open_checkpoint(saved("llama", tmp_path / "model")), (CPU,))
    assert isinstance(decoder.skeleton.embedding.weight, StoredTable)
    assert decoder.bytes_read == decoder.stored.bytes_of("ends")


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_change_of_the_embeddings_takes_effect(tmp_path: Any, on_disk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table stays in its file, and where it has to be in memory."""
    folder = saved("llama", tmp_path / "model", dtype=torch.float32)
    checkpoint = open_checkpoint(folder)
    added = torch.randn(checkpoint["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(1))
    if not on_disk:
        monkeypatch.setattr("moe_svd_distill.streaming.decoder.stored_tables", lambda *_: {})
    decoder = Decoder(checkpoint, (CPU,), embedding_change=lambda ids: added[ids])
    decoder.enter_all()
    whole = load(folder)
    with torch.no_grad():
        whole.model.embed_tokens.weight.add_(added)
        expected = whole.model(input_ids=IDS, use_cache=False).last_hidden_state
        torch.testing.assert_close(decoder.states(IDS), expected, rtol=1e-4, atol=1e-5)
