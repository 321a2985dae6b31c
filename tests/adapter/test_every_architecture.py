"""Every matrix of every model type: a pair of it arrives in PEFT and does what it says, or the matrix is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_svd_distill.adapter.adapter_file import ADAPTER_FILE, CONFIGURATION_FILE, write_json
from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.fused import Factors
from moe_svd_distill.adapter.keys import AdapterKeys, entries
from moe_svd_distill.adapter.load_check import check_loads
from moe_svd_distill.adapter.peft_model import modules_of
from moe_svd_distill.adapter.settling import settle_keys
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.checkpoints import open_checkpoint
from tests.support import architectures

RANK = 2

LEFT_OUT: dict[str, dict[str, str]] = {
    "gpt2": {".attn.": "Conv1D", ".mlp.": "Conv1D"},
    "falcon_h1": {"mamba.out_proj": "incompatible with Mamba"},
    "nemotron_h": {"mixer.out_proj": "incompatible with Mamba"},
    "longcat_flash": {"router.classifier": "never called"},
    "jamba": {"dt_proj": "never called"},
    "inkling2_text": {"conv.weight_proj": "PEFT loses its pair"},
    "zamba2": {"shared_transformer": "shared by several layers"},
}
"""Of each type the matrices of layers that no pair can change, and why; of all others, none."""


def random_factors(keys: AdapterKeys) -> dict[str, Factors]:
    """``(B, A)`` of every matrix that an adapter may change."""
    generator = torch.Generator().manual_seed(0)
    slots, tied = keys.architecture.skeleton.slots, keys.architecture.tied
    found: dict[str, Factors] = {}
    for target in keys.targets.values():
        shapes = [matrix.shape for matrix in target.matrices] or [slots[target.parameter].shape]
        for name, (rows, columns) in zip(target.names, shapes, strict=True) if target.matrices or not tied else ():
            draw = [0.3 * torch.randn(shape, generator=generator) for shape in ((rows, RANK), (RANK, columns))]
            found[name] = draw[0], draw[1]
    return found


def write_adapter(folder: Path, keys: AdapterKeys, factors: dict[str, Factors]) -> Path:
    """An adapter with a pair for each of these matrices."""
    architecture = keys.architecture
    targets = keys.changed_by(factors)
    ranks = {target.parameter: target.rank(lambda name: RANK) for target in targets}
    configuration = build_configuration(keys, ranks, base_model="")
    folder.mkdir()
    write_json(folder / CONFIGURATION_FILE, configuration)
    modules = modules_of(architecture, configuration)
    assert set(modules) == {target.parameter for target in targets}
    tensors: dict[str, Tensor] = {}
    for target in targets:
        for entry in entries(keys, target, modules[target.parameter], lambda name: RANK):
            tensors[entry.key] = entry.make(factors.__getitem__).contiguous()
            assert tensors[entry.key].shape == entry.shape
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=architectures.tokens(length=24), use_cache=False).logits.float()


def check_adapter(keys: AdapterKeys, folder: Path, load: Callable[[], Any]) -> None:
    """PEFT loads an adapter of all matrices and nothing is lost: merged and unmerged it is the composed model."""
    from peft import PeftModel

    factors = random_factors(keys)
    adapter = write_adapter(folder / "adapter", keys, factors)
    composed = load()
    base = {name: tensor.clone() for name, tensor in composed.state_dict().items()}
    weights = dict(composed.named_parameters(remove_duplicate=False))
    before = logits(composed)
    with torch.no_grad():
        for target in keys.changed_by(factors):
            weight = weights[target.parameter]
            for index, name in enumerate(target.names):
                left, right = factors[name]
                region = target.matrices[index].within(weight) if target.matrices else weight
                region += left @ right
    expected = logits(composed)
    assert float((expected - before).abs().max()) > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(load(), str(adapter)).eval()
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-3 * scale)
    with torch.no_grad():
        merged = dict(adapted.merge_and_unload().named_parameters(remove_duplicate=False))
    for name, parameter in merged.items():
        torch.testing.assert_close(parameter.detach(), weights[name].detach(), rtol=1e-4, atol=1e-4, msg=name)
    untouched = set(weights) - {target.parameter for target in keys.changed_by(factors)}
    assert all(torch.equal(merged[name], base[name]) for name in untouched)


@pytest.mark.parametrize("model_type", architectures.every_type())
def test_every_pair_does_what_it_says_or_is_named(model_type: str, tmp_path: Path) -> None:
    folder = architectures.saved(model_type, tmp_path / "model")
    architecture = Architecture(open_checkpoint(folder))
    keys = settle_keys(architecture)
    given = {name for target in keys.layers for name in target.names}
    lacking = {name: keys.left_out[name] for name in architecture.by_name if name not in given}
    for part, reason in LEFT_OUT.get(model_type, {}).items():
        named = [name for name, why in keys.left_out.items() if part in name and reason in why]
        assert named, f"{part} is not left out"
        lacking = {name: why for name, why in lacking.items() if name not in named}
    assert not lacking
    if given:
        check_loads(write_adapter(tmp_path / "checked", keys, random_factors(keys)), folder)
        check_adapter(keys, tmp_path, lambda: architectures.load(folder))


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4", "kimi_k25", "llama4", "mistral3", "qwen3_5_moe"])
def test_an_adapter_for_text_alone_loads_in_its_class(model_type: str, tmp_path: Path) -> None:
    folder = architectures.saved(model_type, tmp_path / "model")
    keys = settle_keys(Architecture(open_checkpoint(folder), text_only=True))
    whole = architectures.load(folder)

    def load() -> Any:
        return text_model(keys.architecture, whole)

    assert type(load()) is type(keys.architecture.skeleton.model)
    check_loads(write_adapter(tmp_path / "checked", keys, random_factors(keys)), folder, text_only=True)
    check_adapter(keys, tmp_path, load)


def text_model(architecture: Architecture, whole: Any) -> Any:
    """The class for text alone with the weights of the checkpoint's own."""
    inner = architecture.skeleton
    model = type(inner.model)(inner.model.config)
    names = {inner.name_of(name): tensor for name, tensor in whole.state_dict().items()}
    model.load_state_dict({name: names[name] for name in model.state_dict()})
    return model.eval()
