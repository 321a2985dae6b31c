"""How related two models are, measured on real files: trained pairs, planted students, bounds on what is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_svd_distill.pairing.lineage import Comparison, Lineage, Relatedness, Vocabularies, choose_method
from moe_svd_distill.pipeline import probing, sampling
from moe_svd_distill.pipeline.method import compare_models, measure_relatedness
from moe_svd_distill.pipeline.pair import open_model, open_pair
from moe_svd_distill.pipeline.plan import make_plan
from moe_svd_distill.pipeline.sampling import runs, spread_rows
from moe_svd_distill.roles import ROLES, Axis, TensorView
from tests.support import architectures
from tests.support.heads import TEXT, trained_tokenizer, with_tokenizer
from tests.support.models import save, saved
from tests.support.pairs import FAMILIES, planted_pair, recipe_for, with_tensors

LAB = Path(__file__).parents[2] / "lab"
PAIRS = yaml.safe_load((LAB / "pairs.yaml").read_text(encoding="utf-8"))["pairs"]


def measure(teacher: Path, student: Path) -> Relatedness:
    with open_pair(str(teacher), str(student)) as pair:
        return measure_relatedness(pair)


def lab(pair: str, which: str) -> Path:
    return LAB / PAIRS[pair][which]


def changed(model: Path, folder: Path, change: Callable[[Any, str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model with `change(layout, name, tensor)` applied to every tensor."""
    opened = open_model(str(model))
    tensors = {name: change(opened.layout, name, opened.checkpoint.read(name).clone()) for name in opened.checkpoint}
    return with_tensors(model, folder, tensors)


EXPECTED = {
    "sibling": (Lineage.ONE, ("weights", "calibrated"), ("weights",)),
    "pruned": (Lineage.CROPPED, ("calibrated",), ()),
    "independent": (Lineage.INDEPENDENT, ("calibrated",), ()),
    "dense": (Lineage.INDEPENDENT, ("calibrated",), ()),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_lab_pairs_are_told_apart(name: str) -> None:
    lineage, with_text, without = EXPECTED[name]
    found = measure(lab(name, "teacher"), lab(name, "student"))
    assert found.lineage is lineage, found.reason
    assert found.vocabulary.kind is Vocabularies.EQUAL
    assert choose_method(found, has_text=True).stages == with_text
    assert choose_method(found, has_text=False).stages == without


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (("sibling", "teacher"), ("dense", "student")),  # MoE to dense, other width
        (("sibling", "teacher"), ("dense", "teacher")),  # MoE to dense, same width and heads
        (("independent", "student"), ("pruned", "student")),  # one architecture, one shape, one text
    ],
)
def test_one_text_and_one_shape_make_no_lineage(teacher: tuple[str, str], student: tuple[str, str]) -> None:
    found = measure(lab(*teacher), lab(*student))
    assert found.lineage is Lineage.INDEPENDENT, found.reason
    assert not any(probe.related for probe in found.probes)


def test_a_pruned_student_shows_which_layers_and_experts_were_kept() -> None:
    found = measure(lab("pruned", "teacher"), lab("pruned", "student"))
    layers = {
        probe.student.split(".")[2]: probe.teacher.split(".")[2] for probe in found.probes if "layers" in probe.teacher
    }
    assert layers == {"0": "0", "1": "2", "2": "4"}
    assert all(probe.related for probe in found.probes)
    assert {probe.comparison for probe in found.probes} == {Comparison.CHANNELS, Comparison.ROWS}


@pytest.mark.parametrize(
    ("noise", "lineage"), [(0.5, Lineage.CROPPED), (1.5, Lineage.CROPPED), (8.0, Lineage.INDEPENDENT)]
)
def test_a_cropped_student_is_recognised_through_noise(noise: float, lineage: Lineage, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(layout: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
        error = noise * tensor.float().std() * torch.randn(tensor.shape, generator=generator)
        return (tensor.float() + error).to(tensor.dtype) if tensor.ndim == 2 else tensor

    student = changed(lab("pruned", "student"), tmp_path / "noisy", noisy)
    assert measure(lab("pruned", "teacher"), student).lineage is lineage


@pytest.mark.parametrize("model_type", FAMILIES)
def test_permuted_heads_neurons_and_experts_are_one_lineage(model_type: str, tmp_path: Path) -> None:
    teacher, student, _ = planted_pair(model_type, tmp_path)
    found = measure(teacher, student)
    assert found.lineage is Lineage.ONE, found.reason
    assert any(probe.related and probe.comparison is Comparison.ROWS for probe in found.probes)
    assert not any(probe.identical for probe in found.probes if probe.role != "embedding")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_random_models_are_independent_whatever_their_shape(model_type: str, tmp_path: Path) -> None:
    student = saved(model_type, tmp_path / "s", seed=2)
    for seed, changes in ((1, {}), (3, {"hidden_size": 48})):
        teacher = saved(model_type, tmp_path / f"t{seed}", seed=seed, **changes)
        found = measure(teacher, student)
        assert found.lineage is Lineage.INDEPENDENT, found.reason
        assert found.same_shape is (not changes)


def test_a_residual_stream_in_another_order_is_found_and_is_no_plain_difference(tmp_path: Path) -> None:
    teacher = lab("sibling", "teacher")
    order = torch.randperm(192, generator=torch.Generator().manual_seed(0))

    def permuted(layout: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
        for dimension, axis in enumerate(ROLES[layout.meanings[name].role].axes):
            tensor = tensor.index_select(dimension, order) if axis is Axis.RESIDUAL else tensor
        return tensor

    found = measure(teacher, changed(teacher, tmp_path / "s", permuted))
    assert found.lineage is Lineage.CROPPED
    assert "another order" in found.reason
    assert choose_method(found, has_text=True).stages == ("calibrated",)


def test_the_same_weights_are_recognised_and_one_changed_tensor_denies_it(tmp_path: Path) -> None:
    teacher = saved("qwen3_moe", tmp_path / "t")
    same = shutil.copytree(teacher, tmp_path / "same")
    found = measure(teacher, same)
    assert found.lineage is Lineage.SAME
    assert choose_method(found, has_text=True).stages == ()

    def touch(layout: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2 if name == "model.layers.1.self_attn.o_proj.weight" else tensor

    assert measure(teacher, changed(teacher, tmp_path / "touched", touch)).lineage is Lineage.ONE


def test_fewer_layers_are_a_crop(tmp_path: Path) -> None:
    teacher = saved("llama", tmp_path / "t", num_hidden_layers=4)
    student = saved("llama", tmp_path / "s", num_hidden_layers=2, seed=5)
    source = open_model(str(teacher)).checkpoint
    kept = {name: source.read(name.replace("layers.1.", "layers.3.")) for name in open_model(str(student)).checkpoint}
    found = measure(teacher, with_tensors(student, tmp_path / "crop", kept))
    assert found.lineage is Lineage.CROPPED
    assert [item.name for item in found.differences] == ["layers"]
    assert any(".layers.3." in probe.teacher and probe.identical for probe in found.probes)


@pytest.mark.parametrize(("teacher_layers", "student_layers"), [(1, 1), (1, 4), (4, 1)])
def test_any_depths_can_be_compared(teacher_layers: int, student_layers: int, tmp_path: Path) -> None:
    teacher = saved("llama", tmp_path / "t", num_hidden_layers=teacher_layers)
    student = saved("llama", tmp_path / "s", num_hidden_layers=student_layers, seed=5)
    found = measure(teacher, student)
    assert found.lineage is Lineage.INDEPENDENT
    assert {"attention.q", "attention.k", "dense.gate"} <= {probe.role for probe in found.probes}


def test_no_tensor_is_skipped_in_silence(tmp_path: Path) -> None:
    teacher = saved("llama", tmp_path / "t", dtype=torch.float32)

    def broken(layout: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "model.embed_tokens.weight":
            tensor[:, 3] = float("nan")
        return tensor

    found = measure(teacher, changed(teacher, tmp_path / "nan", broken))
    assert any("model.embed_tokens.weight holds NaN" in line for line in found.skipped)
    assert any("vocabularies: unknown" in line for line in found.skipped)
    tied = saved("llama", tmp_path / "tied", tie_word_embeddings=True)
    assert any(line.startswith("head: not in both") for line in measure(teacher, tied).skipped)


def test_what_is_read_is_bounded_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ALLOWANCE", {"embedding": 16384, "head": 12288}), ("BODY_ALLOWANCE", 28672)):
        monkeypatch.setattr(probing, name, value)
    monkeypatch.setattr(probing, "CONFIRMATION", 8192)
    monkeypatch.setattr(sampling, "BLOCK_BYTES", 256)
    read: list[int] = []
    original = sampling.RowSampler.rows

    def counted(self: sampling.RowSampler, view: TensorView, index: list[int]) -> torch.Tensor:
        shape = self.model.shapes[view.stored]
        read.append(len(index) * shape[-1] * 2 if len(shape) == 2 else len(index) * 2)
        return original(self, view, index)

    monkeypatch.setattr(sampling.RowSampler, "rows", counted)
    big: dict[str, Any] = {"hidden_size": 128, "vocab_size": 4096, "num_experts": 16, "moe_intermediate_size": 128}
    teacher = saved("qwen3_moe", tmp_path / "t", seed=1, **big)
    student = saved("qwen3_moe", tmp_path / "s", seed=2, **big)
    found = measure(teacher, student)
    assert sum(found.bytes_read) == sum(read)
    assert max(found.bytes_read) <= 64 * 1024 < open_model(str(teacher)).checkpoint.total_bytes
    assert found.lineage is Lineage.INDEPENDENT
    assert measure(teacher, shutil.copytree(teacher, tmp_path / "same")).lineage is Lineage.SAME


def test_rows_are_spread_in_runs() -> None:
    assert spread_rows(10, 10, 4) == list(range(10))
    chosen = spread_rows(100_000, 1024, 4096)
    assert len(chosen) == len(set(chosen)) == 1024
    assert (chosen[0], chosen[-1]) == (0, 99_999)
    breaks = sum(after != before + 1 for before, after in pairwise(chosen))
    assert breaks == 15
    assert spread_rows(7, 3, 10**9) == [0, 3, 6]
    assert runs([4, 5, 6, 2, 3, 9]) == [(4, 7), (2, 4), (9, 10)]


def test_without_weights_the_sizes_are_still_compared(tmp_path: Path) -> None:
    with open_pair(str(lab("pruned", "teacher")), str(lab("pruned", "student"))) as pair:
        found = measure_relatedness(pair, sample_weights=False)
    assert (found.lineage, found.bytes_read, found.probes) == (Lineage.UNKNOWN, (0, 0), ())
    assert any("not on this machine" in line for line in found.skipped)
    assert "hidden" in {item.name for item in found.differences}
    assert choose_method(found, has_text=True).stages == ("calibrated",)


def test_tokens_that_moved_are_found_by_their_text(tmp_path: Path) -> None:
    """A student whose vocabulary is numbered otherwise, its embeddings along with it."""
    teacher = lab("sibling", "teacher")
    content = json.loads((teacher / "tokenizer.json").read_text(encoding="utf-8"))
    count = len(content["model"]["vocab"])
    order = [
        0,
        *(number + 1 for number in torch.randperm(count - 1, generator=torch.Generator().manual_seed(0)).tolist()),
    ]
    content["model"]["vocab"] = {token: order[number] for token, number in content["model"]["vocab"].items()}

    def renumbered(layout: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if ROLES[layout.meanings[name].role].axes[0] is not Axis.VOCABULARY:
            return tensor
        moved = tensor.clone()
        moved[torch.tensor(order)] = tensor[:count]
        return moved

    student = changed(lab("sibling", "student"), tmp_path / "s", renumbered)
    (student / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    found = measure(teacher, student)
    assert found.vocabulary.kind is Vocabularies.DIFFERENT
    assert found.lineage is Lineage.ONE
    assert all(probe.related for probe in found.probes if probe.role in ("embedding", "head"))
    assert choose_method(found, has_text=True).stages == ("weights",)


def test_inspect_and_plan_say_the_same(tmp_path: Path) -> None:
    teacher, student = lab("sibling", "teacher"), lab("sibling", "student")
    facts = compare_models(str(teacher), str(student))
    assert facts["relatedness"]["lineage"] == "one lineage"
    assert facts["student"]["hidden"] == 192
    text = {"calibration": [str(TEXT)], "tokens": 1024, "scale_search_tokens": 1024}
    for values, key in (({}, "without_text"), (text, "with_text")):
        outlook = make_plan(recipe_for(teacher, student, tmp_path / "out", **values)).as_dict()
        assert outlook["method"]["auto"] == facts["method"][key]
        assert outlook["relatedness"] == facts["relatedness"]
        json.dumps(outlook)


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text", "phi3"])
def test_matrices_inside_stored_tensors_are_compared_too(model_type: str, tmp_path: Path) -> None:
    teacher, student, _ = planted_pair(model_type, tmp_path)
    found = measure(teacher, student)
    assert found.lineage is Lineage.ONE, found.reason
    inside = {probe.student.rpartition(".")[2] for probe in found.probes if probe.student.endswith((".q", ".gate"))}
    assert inside == {"q", "gate"} if model_type == "phi3" else inside == {"gate"}
    assert measure(teacher, shutil.copytree(teacher, tmp_path / "same")).lineage is Lineage.SAME


def test_models_without_roles_have_no_known_lineage(tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2):
        model = open_model(str(saved("llama", tmp_path / f"m{seed}", seed=seed)))
        odd = {
            name.replace("embed_tokens", "lookup")
            .replace("lm_head", "out_map")
            .replace("self_attn", "mix")
            .replace("mlp", "mem"): model.checkpoint.read(name)
            for name in model.checkpoint
        }
        folders.append(with_tensors(model.checkpoint.folder, tmp_path / f"odd{seed}", odd))
        config = json.loads((folders[-1] / "config.json").read_text()) | {"tie_word_embeddings": None}
        (folders[-1] / "config.json").write_text(json.dumps(config))
    found = measure(*folders)
    assert (found.lineage, found.probes) == (Lineage.UNKNOWN, ())
    assert any("not in both models" in line for line in found.skipped)


def test_layers_without_roles_leave_the_other_stages_as_they_are(tmp_path: Path) -> None:
    tokenizer, folders = trained_tokenizer(tmp_path / "tokenizer", 300), []
    for seed in (1, 2):
        model = architectures.saved("gpt_neox", tmp_path / f"m{seed}", seed, vocab_size=300)
        folders.append(with_tokenizer(model, tokenizer))
    text = {"calibration": [str(TEXT)], "tokens": 1024, "scale_search_tokens": 1024}
    outlook = make_plan(recipe_for(*folders, tmp_path / "out", method="calibrated", **text)).as_dict()
    assert outlook["method"]["stages"] == ["calibrated"]
    assert not any("layers" in name for name in outlook["pairings"])


def test_a_change_in_a_tensor_without_a_role_denies_that_the_weights_are_the_same(tmp_path: Path) -> None:
    def single(folder: Path, change: float) -> Path:
        model = architectures.build("qwen3_next", 1)
        with torch.no_grad():
            model.model.layers[0].linear_attn.out_proj.weight.mul_(change)
        return save(model, folder)

    assert measure(single(tmp_path / "a", 1.0), single(tmp_path / "b", 1.0)).lineage is Lineage.SAME
    assert measure(single(tmp_path / "c", 1.0), single(tmp_path / "d", 2.0)).lineage is Lineage.ONE
