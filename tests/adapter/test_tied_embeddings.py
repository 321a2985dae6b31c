"""Changes of the head of a student that ties it to its embeddings: what PEFT does with each, and what is taken.

The first tests hold the facts of decision 9: if a PEFT release changes one of them, the decision wants another look.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from moe_svd_distill.adapter.export import export
from moe_svd_distill.adapter.merge import merge
from moe_svd_distill.adapter.random_control import write_random_control
from moe_svd_distill.adapter.repair import rebuild_configuration
from moe_svd_distill.adapter.verify import check_loads, verify
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.pipeline.pair import open_model
from tests.support import architectures, tiny

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
KEY = f"base_model.model.{HEAD}"
NAMES = ["llama", "qwen3", "qwen3_moe", "mixtral", "glm4_moe"]


@dataclass(frozen=True)
class Tied:
    """A tied student in fp32, a change of its head, and pairs of its queries beside it."""

    student: Path
    weight: torch.Tensor
    change: torch.Tensor
    queries: dict[str, torch.Tensor]

    def logits(self, *, embedding: float = 0.0, head: float = 0.0) -> torch.Tensor:
        """What the student says with its two matrices apart, each with so much of the change."""
        folder = self.student.parent / f"truth {embedding} {head}"
        if not folder.exists():
            folder.mkdir()
            config = tiny.config_of(self.student) | {"tie_word_embeddings": False}
            (folder / "config.json").write_text(json.dumps(config))
            weights = tiny.truth(self.student, self.queries)
            weights[EMBEDDING] = self.weight + embedding * self.change
            weights[HEAD] = self.weight + head * self.change
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return tiny.logits(tiny.load_model(folder))


@pytest.fixture(scope="session")
def make_tied(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tied]:
    known: dict[tuple[str, bool], Tied] = {}

    def make(name: str, *, redundant: bool = False) -> Tied:
        """A tied student; ``redundant`` ones have the head in their files a second time, as some on the hub."""
        if (name, redundant) not in known:
            student = tiny.save_student(tmp_path_factory.mktemp(name) / "student", name, tie_word_embeddings=True)
            weights = tiny.hub_weights(student)
            assert HEAD not in weights
            if redundant:
                weights[HEAD] = weights[EMBEDDING].clone()
                save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
            generator = torch.Generator().manual_seed(4)
            change = 0.1 * torch.randn(64, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
            queries = tiny.random_pairs(student, [n for n in weights if "q_proj.weight" in n])
            known[name, redundant] = Tied(student, weights[EMBEDDING].float(), change, queries)
        return known[name, redundant]

    return make


@pytest.fixture(params=NAMES)
def tied(request: pytest.FixtureRequest, make_tied: Callable[..., Tied]) -> Tied:
    return make_tied(request.param)


def factors(change: torch.Tensor, hub_name: str) -> dict[str, torch.Tensor]:
    """An exact pair of rank 4 for a change ``(V, H)``."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    b, a = u[:, :4] * s[:4], v[:4]
    if hub_name == HEAD:
        return {
            "base_model.model.lm_head.lora_A.weight": a.contiguous(),
            "base_model.model.lm_head.lora_B.weight": b.contiguous(),
        }
    return {
        "base_model.model.model.embed_tokens.lora_embedding_A": b.T.contiguous(),
        "base_model.model.model.embed_tokens.lora_embedding_B": a.T.contiguous(),
    }


def by_hand(tied: Tied, folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """An adapter with a configuration that this project would not write."""
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "inference_mode": True}
    return tiny.save_adapter(folder, tied.student, tensors, plain | changes)


@pytest.mark.parametrize("hub_name", [HEAD, EMBEDDING])
def test_a_pair_is_right_live_and_wrong_merged(make_tied: Callable[..., Tied], tmp_path: Path, hub_name: str) -> None:
    tied = make_tied("llama")
    module = hub_name.split(".")[-2]
    tensors = tied.queries | factors(tied.change, hub_name)
    model = tiny.with_adapter(tied.student, by_hand(tied, tmp_path / "a", tensors, target_modules=["q_proj", module]))
    wanted = tied.logits(head=1.0) if hub_name == HEAD else tied.logits(embedding=1.0)
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=0, atol=1e-4)
    merged = tiny.logits(model.merge_and_unload())
    torch.testing.assert_close(merged, tied.logits(head=1.0, embedding=1.0), rtol=0, atol=1e-4)
    assert (merged - wanted).abs().max() > 1e-2


def test_tied_pairs_are_merged_twice(make_tied: Callable[..., Tied], tmp_path: Path) -> None:
    """``ensure_weight_tying`` with a pair of the embeddings, as PEFT writes it: live both change, merged both twice."""
    tied = make_tied("qwen3")
    tensors = tied.queries | factors(tied.change, EMBEDDING)
    changes = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    model = tiny.with_adapter(tied.student, by_hand(tied, tmp_path / "a", tensors, **changes))
    torch.testing.assert_close(tiny.logits(model), tied.logits(head=1.0, embedding=1.0), rtol=0, atol=1e-4)
    merged = tiny.logits(model.merge_and_unload())
    torch.testing.assert_close(merged, tied.logits(head=2.0, embedding=2.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_whole_matrix_that_is_to_stay_tied_does_not_load(
    make_tied: Callable[..., Tied], tmp_path: Path, saved: str
) -> None:
    tied = make_tied("llama")
    key = KEY if saved == "lm_head" else f"base_model.model.{EMBEDDING}"
    tensors = tied.queries | {key: tied.weight + tied.change}
    changes = {"target_modules": ["q_proj"], "modules_to_save": [saved], "ensure_weight_tying": True}
    adapter = by_hand(tied, tmp_path / "a", tensors, **changes)
    with pytest.raises(KeyError):
        tiny.with_adapter(tied.student, adapter)
    with pytest.raises(BadDataError):
        check_loads(adapter, tied.student)


@pytest.mark.parametrize("redundant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_head_saved_whole_is_right_everywhere(
    make_tied: Callable[..., Tied], tmp_path: Path, name: str, redundant: bool
) -> None:
    tied = make_tied(name, redundant=redundant)
    tensors = tied.queries | {KEY: tied.weight + tied.change}
    adapter = tiny.save_adapter(tmp_path / "adapter", tied.student, tensors)
    assert check_loads(adapter, tied.student).replaced == ("lm_head",)
    assert verify(adapter, tied.student).whole == ("lm_head",)
    wanted = tied.logits(head=1.0)
    assert (wanted - tied.logits(head=1.0, embedding=1.0)).abs().max() > 1e-2
    model = tiny.with_adapter(tied.student, adapter)
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=0, atol=1e-4)
    model.save_pretrained(str(tmp_path / "again"))
    torch.testing.assert_close(
        tiny.logits(tiny.with_adapter(tied.student, tmp_path / "again")), wanted, rtol=0, atol=1e-4
    )
    with pytest.warns(UserWarning, match="Input and output embeddings are no longer tied after merging"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(tiny.logits(merged), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(merged.lm_head.weight, tied.weight + tied.change, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged.get_input_embeddings().weight, tied.weight, rtol=0, atol=1e-6)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(tiny.logits(tiny.load_model(tmp_path / "merged")), wanted, rtol=0, atol=1e-4)


def test_a_pair_of_the_embeddings_beside_a_whole_head_stays_with_the_embeddings(tied: Tied, tmp_path: Path) -> None:
    tensors = tied.queries | factors(tied.change, EMBEDDING) | {KEY: tied.weight - tied.change}
    adapter = tiny.save_adapter(tmp_path / "adapter", tied.student, tensors)
    check_loads(adapter, tied.student)
    wanted = tied.logits(embedding=1.0, head=-1.0)
    model = tiny.with_adapter(tied.student, adapter)
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(tiny.logits(model.merge_and_unload()), wanted, rtol=0, atol=1e-4)
    merge(adapter, tied.student, tmp_path / "ours")
    ours = tiny.hub_weights(tmp_path / "ours")
    exact = tied.weight + tied.change
    assert bool(((ours[EMBEDDING].float() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all())
    assert torch.equal(ours[HEAD], (tied.weight - tied.change).to(torch.bfloat16))


@pytest.mark.parametrize("redundant", [False, True])
@pytest.mark.parametrize("shard", ["50GB", "15KB"])
def test_our_merge_unties(make_tied: Callable[..., Tied], tmp_path: Path, shard: str, redundant: bool) -> None:
    tied = make_tied("glm4_moe", redundant=redundant)
    student = tied.student
    if shard == "15KB":
        student = tiny.save_student(tmp_path / "sharded", "glm4_moe", shard=shard, tie_word_embeddings=True)
        if redundant:
            first = sorted(student.glob("*.safetensors"))[0]
            save_file(load_file(first) | {HEAD: tied.weight.bfloat16()}, first, metadata={"format": "pt"})
            index = json.loads((student / "model.safetensors.index.json").read_text())
            index["weight_map"][HEAD] = first.name
            (student / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = tied.queries | {KEY: tied.weight + tied.change}
    adapter = tiny.save_adapter(tmp_path / "adapter", student, tensors)
    seen: list[tuple[int, int]] = []
    report = merge(adapter, student, tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    assert report.untied
    assert seen[-1] == (report.bytes, report.bytes)
    merged = open_checkpoint(tmp_path / "out")
    before = open_checkpoint(student)
    assert merged.config == before.config | {"tie_word_embeddings": False}
    assert report.bytes == merged.total_bytes
    assert report.merged + report.copied == len(merged) == len(before) + (0 if redundant else 1)
    assert torch.equal(merged.read(HEAD), (tied.weight + tied.change).to(torch.bfloat16))
    for name in before:
        if "q_proj.weight" not in name and name != HEAD:
            assert torch.equal(merged.read(name), before.read(name)), name
    if shard == "15KB":
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == merged.keys()
        if not redundant:
            old = json.loads((student / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == old["metadata"]["total_size"] + 64 * 32 * 2
    found, wanted = tiny.logits(tiny.load_model(tmp_path / "out")), tied.logits(head=1.0)
    # Means, because rounding to bf16 may send a token on the edge to another expert.
    assert (found - wanted).abs().mean() < 0.05 * (tied.logits() - wanted).abs().mean()
    assert not AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings


@pytest.mark.parametrize("hub_name", [HEAD, EMBEDDING])
def test_pairs_alone_are_refused_and_the_way_out_is_named(tied: Tied, tmp_path: Path, hub_name: str) -> None:
    tensors = tied.queries | factors(tied.change, hub_name)
    untied = tiny.save_student(tmp_path / "untied", tiny.config_of(tied.student)["model_type"])
    adapter = tiny.save_adapter(tmp_path / "adapter", tied.student, tensors, tiny.configure(untied, tensors))
    for call in (
        lambda: tiny.configure(tied.student, tensors),
        lambda: check_loads(adapter, tied.student),
        lambda: merge(adapter, tied.student, tmp_path / "out"),
        lambda: verify(adapter, tied.student),
        lambda: rebuild_configuration(adapter, tied.student),
    ):
        with pytest.raises(BadDataError, match="ties its head") as caught:
            call()
        assert "modules_to_save" in caught.value.action


def test_tying_in_the_configuration_is_refused(make_tied: Callable[..., Tied], tmp_path: Path) -> None:
    tied = make_tied("llama")
    tensors = tied.queries | {KEY: tied.weight + tied.change}
    configuration = tiny.configure(tied.student, tensors) | {"ensure_weight_tying": True}
    adapter = tiny.save_adapter(tmp_path / "adapter", tied.student, tensors, configuration)
    with pytest.raises(BadDataError, match="ensure_weight_tying"):
        merge(adapter, tied.student, tmp_path / "out")


def test_the_random_control_starts_from_the_embeddings(tied: Tied, tmp_path: Path) -> None:
    tensors = tied.queries | {KEY: tied.weight + tied.change}
    adapter = tiny.save_adapter(tmp_path / "adapter", tied.student, tensors)
    write_random_control(adapter, tmp_path / "control", 0, tied.student)
    control = load_file(tmp_path / "control" / "adapter_model.safetensors")[KEY] - tied.weight
    torch.testing.assert_close(control.norm(), tied.change.norm(), rtol=1e-5, atol=0)


def test_a_student_that_is_tied_and_is_not_is_refused(make_tied: Callable[..., Tied], tmp_path: Path) -> None:
    tied = make_tied("qwen3")
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.json").write_text((tied.student / "config.json").read_text())
    weights = tiny.hub_weights(tied.student)
    save_file(weights | {HEAD: weights[EMBEDDING] + 1}, student / "model.safetensors", metadata={"format": "pt"})
    tensors = tied.queries | {KEY: tied.weight + tied.change}
    adapter = tiny.save_adapter(tmp_path / "adapter", tied.student, tensors)
    for call in (
        lambda: merge(adapter, student, tmp_path / "out"),
        lambda: write_random_control(adapter, tmp_path / "control", 0, student),
        lambda: verify(adapter, student),
        lambda: export(adapter, tmp_path / "exported", "peft", student),
        lambda: open_model(str(student)),
    ):
        with pytest.raises(BadDataError, match="differ in its files: transformers 5 takes the head") as caught:
            call()
        assert "tie_word_embeddings" in caught.value.action


def test_tying_that_config_json_leaves_to_the_class(make_tied: Callable[..., Tied], tmp_path: Path) -> None:
    """Of Gemma a config.json without the key means tied embeddings."""
    folder = architectures.saved("gemma2", tmp_path / "m", tie_word_embeddings=True)
    config = tiny.config_of(folder)
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    weights = tiny.hub_weights(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    for shift in (0, 1):
        head = weights[EMBEDDING].clone()
        head[5, 7] += shift
        save_file(weights | {HEAD: head}, folder / "model.safetensors", metadata={"format": "pt"})
        model = open_model(str(folder))
        if shift:
            with pytest.raises(BadDataError, match="differ in its files"):
                _ = model.architecture
        else:
            assert model.architecture.tied
