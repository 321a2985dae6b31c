"""A pair of every matrix of a model, for each model type: it arrives in PEFT, is read back, and merges as it acts."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.keys import AdapterKeys, Factors, Target, planned_tensors
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.merge import merge
from moe_svd_distill.adapter.naming import parse_key, whole_key
from moe_svd_distill.adapter.peft_model import modules_of
from moe_svd_distill.adapter.repair import rebuild_configuration
from moe_svd_distill.adapter.verify import check_loads, verify
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.checkpoints import open_checkpoint
from tests.support import tiny
from tests.support.architectures import every_type, load, saved, tokens

RANK, SIZE = 3, 0.1
REFUSED_BY_PEFT = "is incompatible with Mamba-based models"
NEVER_CALLED = "its module is never called: unmerged, a pair would change nothing"
LEFT_OUT = {  # beside what no LoRA can carry: biases and vectors, buffers, convolutions, matrices that are no weights
    "jamba": {r"mamba\.dt_proj\.weight": NEVER_CALLED},
    "longcat_flash": {r"mlp\.router\.classifier\.weight": NEVER_CALLED},
    "nemotron_h": {r"mixer\.out_proj\.weight": REFUSED_BY_PEFT},
    "falcon_h1": {r"mamba\.out_proj\.weight": REFUSED_BY_PEFT},
    "inkling_text": {r"embed_tokens\.weight": "not to their rows"},
    "inkling2_text": {r"sconv\.weight_proj": "PEFT loses its pair", r"llm\.embed\.weight": "not to their rows"},
    "gpt2": {r"\.c_(attn|proj|fc)\.weight": "holds its weight transposed"},
    "zamba2": {r"\.shared_transformer\.": "shared by several layers"},
}
PLAIN = re.compile(r"no LoRA can carry|a convolution|a matrix that is not the weight|embeddings inside a layer")


@dataclass(frozen=True)
class Every:
    """A model and a random adapter of all that an adapter of it can change."""

    name: str
    student: Path
    adapter: Path
    keys: AdapterKeys
    targets: list[Target]
    factors: dict[str, Factors]
    configuration: dict[str, Any]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Every]:
    known: dict[str, Every] = {}

    def made(name: str) -> Every:
        if name not in known:
            known[name] = write(name, tmp_path_factory.mktemp("every"))
        return known[name]

    return made


def write(name: str, folder: Path, **changes: Any) -> Every:
    student = saved(name, folder / "student", **changes)
    keys = tiny.keys_of(student)
    ends = () if keys.architecture.tied else (keys.architecture.head, keys.architecture.embedding)
    generator = torch.Generator().manual_seed(0)
    factors: dict[str, Factors] = {}
    for target in keys.targets.values():
        shapes = [matrix.shape for matrix in target.matrices]
        shapes = shapes or [keys.architecture.skeleton.slots[target.parameter].shape[:2]] * (target.names[0] in ends)
        for matrix, (rows, columns) in zip(target.names, shapes, strict=False):
            left, right = (torch.randn(size, generator=generator) for size in ((rows, RANK), (RANK, columns)))
            factors[matrix] = SIZE * left, SIZE * right
    targets = keys.changed_by(factors)
    ranks = {target.parameter: target.rank(lambda _: RANK) for target in targets}
    configuration = build_configuration(keys, ranks, base_model=str(student))
    modules = modules_of(keys.architecture, configuration)
    tensors = {}
    for key, plan in planned_tensors(keys, targets, modules, tiny.GivenPairs(factors)).items():
        tensors[key] = plan.make().contiguous()
        assert tensors[key].shape == plan.shape
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps(configuration))
    return Every(name, student, adapter, keys, targets, factors, configuration)


@pytest.mark.parametrize("name", every_type())
def test_what_is_left_out_has_its_reason(make: Callable[[str], Every], name: str) -> None:
    keys, architecture = make(name).keys, make(name).keys.architecture
    sources = (source for layer in range(architecture.layers) for source in architecture.stored.of_part[layer])
    stored = {hub_name for source in sources for hub_name in source.hub_names}
    carried = {matrix_name for target in keys.targets.values() for matrix_name in target.names}
    assert {*architecture.by_name, architecture.head, architecture.embedding} <= carried | set(keys.left_out)
    converted = {hub_name for hub_name in stored for matrix in carried if matrix.startswith(f"{hub_name}[")}
    assert stored - converted <= carried | set(keys.left_out) | made_by_an_operation(architecture, carried)
    assert not carried & set(keys.left_out)
    special = {matrix: reason for matrix, reason in keys.left_out.items() if not PLAIN.search(reason)}
    expected = LEFT_OUT.get(name, {})
    for matrix, reason in special.items():
        assert any(re.search(part, matrix) and why in reason for part, why in expected.items()), (matrix, reason)
    for part in expected:
        assert any(re.search(part, matrix) for matrix in special), part


def made_by_an_operation(architecture: Architecture, carried: set[str]) -> set[str]:
    """Stored tensors of which transformers makes parameters that are carried under their names in memory."""
    sources = (source for layer in range(architecture.layers) for source in architecture.stored.of_part[layer])
    inside = {matrix.split("[")[0] for matrix in carried}
    made = [source for source in sources if not source.pieces and inside & {slot.name for slot in source.slots}]
    return {hub_name for source in made for hub_name in source.hub_names}


@pytest.mark.parametrize("name", every_type())
def test_peft_takes_every_pair_and_it_is_read_back(make: Callable[[str], Every], name: str) -> None:
    every = make(name)
    report = check_loads(every.adapter, every.student)
    assert set(report.scales.values()) == {1.0}
    assert set(report.scales) == {target.parameter.removesuffix(".weight") for target in every.targets}
    for configured in (True, False):
        pairs = LowRankPairs(every.adapter, every.keys.architecture, configured=configured)
        assert set(pairs) == set(every.factors)
        for matrix, (left, right) in every.factors.items():
            assert pairs[matrix].scale == 1.0
            torch.testing.assert_close(pairs[matrix].left @ pairs[matrix].right, left @ right, rtol=1e-5, atol=1e-5)
    assert rebuild_configuration(every.adapter, every.student) == every.configuration


@pytest.mark.parametrize("name", every_type())
def test_merged_and_unmerged_say_what_the_sum_says(make: Callable[[str], Every], name: str, tmp_path: Path) -> None:
    every = make(name)
    model = load(every.student)
    before, stored = logits(model), open_checkpoint(every.student)
    composed = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for target in every.targets:
            for matrix in target.matrices:
                left, right = every.factors[matrix.name]
                matrix.within(composed[target.parameter].data).add_(left @ right)
            if not target.matrices:
                left, right = every.factors[target.names[0]]
                composed[target.parameter].add_(left @ right)
    wanted = logits(model)
    bound = 1e-3 * max(1.0, float(wanted.abs().max()))
    assert (wanted - before).abs().max() > 10 * bound

    merge(every.adapter, every.student, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    embedding, padding = merged.get_input_embeddings(), getattr(model.get_input_embeddings(), "padding_idx", None)
    if padding is not None:  # youtu zeroes the row of the padding token when it is loaded
        embedding.weight.data[padding] = model.get_input_embeddings().weight[padding]
    for parameter, value in merged.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(value, composed[parameter], rtol=1e-5, atol=1e-4, msg=parameter)
    assert (logits(merged) - wanted).abs().max() < bound
    assert {key: (info.dtype, info.shape) for key, info in open_checkpoint(tmp_path / "merged").items()} == {
        key: (info.dtype, info.shape) for key, info in stored.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = PeftModel.from_pretrained(load(every.student), str(every.adapter)).eval()
    assert (logits(live) - wanted).abs().max() < bound


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen3_5_moe", "deepseek_v4"])
def test_a_head_saved_whole_is_merged_as_it_acts(name: str, tied: bool, tmp_path: Path) -> None:
    """In wrappers the head's name in memory is another one than in the files, and the flag of tying is further in."""
    every = write(name, tmp_path, tie_word_embeddings=tied)
    architecture, head = every.keys.architecture, every.keys.architecture.head_slot.name
    assert architecture.tied is tied
    ranks = {t.parameter: t.rank(lambda _: RANK) for t in every.targets if t.parameter != head}
    configuration = build_configuration(every.keys, ranks, base_model=str(every.student), whole_head=True)
    ends = [name.removesuffix(".weight") for name in (head, architecture.head)]
    tensors = load_file(every.adapter / "adapter_model.safetensors")
    tensors = {key: value for key, value in tensors.items() if parse_key(key)[0] not in ends}
    own = architecture.checkpoint.read(architecture.embedding if tied else architecture.head)
    tensors[whole_key(ends[0])] = own + SIZE * torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    adapter = tiny.save_adapter(tmp_path / "whole", every.student, tensors, configuration)
    assert verify(adapter, every.student).whole == (ends[0],)
    assert rebuild_configuration(adapter, every.student) == configuration
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = logits(PeftModel.from_pretrained(load(every.student), str(adapter)).eval())
    assert merge(adapter, every.student, tmp_path / "merged").untied is tied
    assert (logits(load(tmp_path / "merged")) - wanted).abs().max() < 1e-3 * max(1.0, float(wanted.abs().max()))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens(), use_cache=False).logits.float()
    return found
