"""Every choice of the recipe does what it says, on real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_svd_distill.algebra.projection import ProjectionError, fourier_projection
from moe_svd_distill.errors import BadDataError, IncompatiblePairError, UsageError
from moe_svd_distill.pipeline.pair import open_model
from moe_svd_distill.transfer import context
from tests.support.models import saved
from tests.support.pairs import delta, recipe_for, records, run_units, with_tensors

WIDE: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "num_experts": 8, "moe_intermediate_size": 24}
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.experts.0.up_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return saved("qwen3_moe", folder / "t", seed=1, **WIDE), saved("qwen3_moe", folder / "s", seed=2)


@pytest.mark.parametrize("projection", ["svd", "fourier", "slice", "procrustes"])
def test_projections_are_recorded_for_every_tensor(projection: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    rows = records(run_units(recipe_for(*pair, tmp_path / "o", projection=projection, rank=4)))
    used = {row["projection"] for row in rows.values() if row["fate"] == "lora"}
    assert used <= {projection, "procrustes, then slice"}
    assert any(row["fate"] == "lora" for row in rows.values())


def test_svd_errors_fall_back_to_fourier_and_say_so(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(matrix: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        raise ProjectionError("no convergence")

    monkeypatch.setattr(context, "svd_projection", broken)
    contents = run_units(recipe_for(*pair, tmp_path / "o", rank="full", dtype="float32"))
    row = records(contents)[Q]
    assert (row["projection"], row["projection_fallback"]) == ("fourier", "svd failed: no convergence")
    teacher, student = (open_model(str(folder)).checkpoint for folder in pair)
    expected = fourier_projection(teacher.read(Q).float(), student[Q].shape) - student.read(Q).float()  # type: ignore[arg-type]
    assert torch.allclose(delta(contents, Q), expected, atol=1e-5)


@pytest.mark.parametrize("fingerprint", ["weights", "router", "function"])
@pytest.mark.parametrize("blend", ["frobenius", "uniform"])
def test_each_student_expert_is_a_blend_of_one_cluster(
    fingerprint: str, blend: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(*pair, tmp_path / "o", rank=4, experts={"fingerprint": fingerprint, "blend": blend})
    contents = run_units(recipe)
    facts = contents[0][1].record["experts"]
    assert sorted(facts["cluster_of_student_expert"]) == [0, 1, 2, 3]
    members = [records(contents)[f"model.layers.0.mlp.experts.{e}.up_proj.weight"]["teacher_experts"] for e in range(4)]
    assert sorted(expert for group in members for expert, _ in group) == list(range(8))
    for slot, group in enumerate(members):
        assert {facts["cluster_of_expert"][expert] for expert, _ in group} == {facts["cluster_of_student_expert"][slot]}
        assert sum(weight for _, weight in group) == pytest.approx(1.0, abs=1e-6)
        if blend == "uniform":
            assert [weight for _, weight in group] == pytest.approx([1 / len(group)] * len(group))


def test_synthetic_expert_and_router_are_the_plain_formula(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_for(
        *pair, tmp_path / "o", rank="full", dtype="float32", projection="slice", depth_map=[0.25, 2], alignment="none"
    )
    contents = run_units(recipe)
    teacher, student = (open_model(str(folder)).checkpoint for folder in pair)
    rows = records(contents)
    for side in ("gate", "up", "down"):
        name = f"model.layers.0.mlp.experts.2.{side}_proj.weight"
        blended: Any = 0.0
        for expert, weight in rows[name]["teacher_experts"]:
            tail = f"mlp.experts.{expert}.{side}_proj.weight"
            lower, upper = (teacher.read(f"model.layers.{layer}.{tail}").double() for layer in (0, 1))
            blended = blended + weight * (0.75 * lower + 0.25 * upper)
        rows_, columns = student[name].shape
        expected = blended[:rows_, :columns] - student.read(name).double()
        assert torch.allclose(delta(contents, name).double(), expected, atol=1e-5), side
    router = "model.layers.0.mlp.gate.weight"
    both = (teacher.read(f"model.layers.{layer}.mlp.gate.weight").double() for layer in (0, 1))
    mixed = torch.lerp(*both, 0.25)
    expected = (
        torch.stack(
            [
                sum(
                    mixed[e] * w
                    for e, w in rows[f"model.layers.0.mlp.experts.{slot}.up_proj.weight"]["teacher_experts"]
                )
                for slot in range(4)
            ]
        )[:, :32]
        - student.read(router).double()
    )
    assert torch.allclose(delta(contents, router).double(), expected, atol=1e-5)


def test_spherical_interpolation_differs_from_linear(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = {
        kind: delta(run_units(recipe_for(*pair, tmp_path / "o", interpolation=kind, depth_map=[0.5, 2], rank=4)), Q)
        for kind in ("linear", "spherical")
    }
    assert not torch.allclose(made["linear"], made["spherical"], atol=1e-3)


def test_assignment_by_index_is_the_first_generations(pair: tuple[Path, Path], tmp_path: Path) -> None:
    contents = run_units(recipe_for(*pair, tmp_path / "o", rank=4, experts={"assignment": "index"}))
    assert contents[0][1].record["experts"]["cluster_of_student_expert"] == [0, 1, 2, 3]


def test_fewer_clusters_serve_several_experts_and_more_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    contents = run_units(recipe_for(*pair, tmp_path / "o", rank=4, experts={"clusters": 2}))
    assert set(contents[0][1].record["experts"]["cluster_of_student_expert"]) == {0, 1}
    with pytest.raises(UsageError, match="only 4 experts"):
        run_units(recipe_for(*pair, tmp_path / "o", rank=4, experts={"clusters": 6}))


def test_a_student_with_more_experts_than_its_teacher(pair: tuple[Path, Path], tmp_path: Path) -> None:
    contents = run_units(recipe_for(pair[1], pair[0], tmp_path / "o", rank=4))
    assert sorted(set(contents[0][1].record["experts"]["cluster_of_student_expert"])) == [0, 1, 2, 3]


def test_sparsity_keeps_the_largest_entries(pair: tuple[Path, Path], tmp_path: Path) -> None:
    contents = run_units(recipe_for(*pair, tmp_path / "o", rank="full", dtype="float32", delta_sparsity=0.2))
    sparse = delta(contents, Q)
    assert (sparse.abs() > 1e-6).float().mean() == pytest.approx(0.2, abs=0.01)


def test_norm_gains_are_folded_so_that_the_layer_sees_the_teachers(tmp_path: Path) -> None:
    teacher, student = saved("qwen3", tmp_path / "t", seed=1), saved("qwen3", tmp_path / "s", seed=2)
    values = {"rank": "full", "head_rank": "full", "dtype": "float32", "alignment": "none"}
    contents = run_units(recipe_for(teacher, student, tmp_path / "o", **values))
    models = [open_model(str(folder)).checkpoint for folder in (teacher, student)]
    for name, norm in ((Q, "model.layers.0.input_layernorm.weight"), ("lm_head.weight", "model.norm.weight")):
        changed = models[1].read(name).float() + delta(contents, name)
        expected = models[0].read(name).float() * models[0].read(norm).float()
        assert torch.allclose(changed * models[1].read(norm).float(), expected, atol=1e-5)
    plain = run_units(recipe_for(teacher, student, tmp_path / "o", norms="keep", **values))
    assert torch.allclose(models[1].read(Q).float() + delta(plain, Q), models[0].read(Q).float(), atol=1e-5)


def test_embeddings_get_a_transposed_pair_when_asked(tmp_path: Path) -> None:
    teacher, student = saved("llama", tmp_path / "t", seed=1), saved("llama", tmp_path / "s", seed=2)
    values = {"embeddings": "delta", "head_rank": "full", "dtype": "float32", "rank": 4}
    contents = run_units(recipe_for(teacher, student, tmp_path / "o", **values))
    name = "model.embed_tokens.weight"
    models = [open_model(str(folder)).checkpoint for folder in (teacher, student)]
    expected = (models[0].read(name).float() - models[1].read(name).float()).mT
    assert torch.allclose(delta(contents, name), expected, atol=1e-5)


def test_energy_chooses_ranks_that_servers_can_take(pair: tuple[Path, Path], tmp_path: Path) -> None:
    contents = run_units(recipe_for(*pair, tmp_path / "o", rank=15, energy=0.6))
    rows = records(contents)
    ranks = {row["rank"] for row in rows.values() if row["role"].startswith("experts.") and ".layers.0." in row["name"]}
    assert len(ranks) == 1
    lora = [row for row in rows.values() if row["fate"] == "lora"]
    assert all(row["energy"] >= 0.6 or row["rank"] == 15 for row in lora)
    assert any(row["rank"] < 15 for row in lora)


def test_nan_fails_by_default_and_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = open_model(str(saved("qwen3_moe", tmp_path / "t", seed=1))).checkpoint
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint}
    tensors[UP][0, :3] = float("nan")
    tensors[UP][1, 0] = float("inf")
    broken = with_tensors(checkpoint.folder, tmp_path / "broken", tensors)
    with pytest.raises(BadDataError) as caught:
        run_units(recipe_for(broken, pair[1], tmp_path / "o", rank=4))
    assert UP in str(caught.value)
    assert "4 NaN or Inf" in str(caught.value)

    skipped = records(run_units(recipe_for(broken, pair[1], tmp_path / "o", rank=4, nan="skip")))
    assert skipped[UP]["fate"] == "kept"
    assert UP in skipped[UP]["reason"]
    assert skipped[Q]["fate"] == "lora"

    zeroed = run_units(recipe_for(broken, pair[1], tmp_path / "o", rank=4, nan="zero"))
    assert zeroed[0][1].record["replaced_by_zero"] == {UP: 4}
    assert all(bool(torch.isfinite(tensor).all()) for _, content in zeroed for tensor in content.tensors.values())


def test_procrustes_needs_one_vocabulary(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = saved("qwen3_moe", tmp_path / "t", vocab_size=100)
    with pytest.raises(IncompatiblePairError, match="vocabulary rows"):
        run_units(recipe_for(other, pair[1], tmp_path / "o", projection="procrustes", rank=4))
