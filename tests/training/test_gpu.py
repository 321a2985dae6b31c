"""Training on a GPU: the same gradients as on the CPU, streamed as resident, and a whole run of the refined stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_svd_distill.adapter.verify import verify
from moe_svd_distill.pipeline.distill import distill
from moe_svd_distill.streaming.devices import Staging
from moe_svd_distill.training.process_group import Distributed
from moe_svd_distill.training.settings import TrainingSettings
from tests.support.heads import TRAINED, student_with_tokenizer, teacher_with_other_head, trained_tokenizer
from tests.support.models import saved
from tests.support.pairs import recipe_for
from tests.support.training import CPU, Setting, disturb, made_up_text, setting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda:0")
FAMILIES = ("qwen3_moe", "llama", "glm4_moe")
SETTINGS = TrainingSettings(epochs=3, step_tokens=64, batch_tokens=32, rate=5e-3, head_rate=5e-3, checks=6, seed=4)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp("model") / "student", dtype=torch.float32)


def _learn(found: Setting, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, float]:
    disturb(found.bank)
    text = made_up_text(6, seed=1)
    batches = [text.take(rows, device) for rows in (np.array([4, 1]), np.array([0]), np.array([5, 3, 2]))]
    found.engine.accumulate_gradients(batches, found.head, len(text.position))
    return found.bank.gradient.cpu(), found.head.gradient.cpu(), float(found.head.loss)


@pytest.mark.parametrize("streamed", [False, True])
def test_gradients_are_those_of_the_cpu(model: Path, tmp_path: Path, streamed: bool) -> None:
    wanted = _learn(setting(model, tmp_path), CPU)
    found = _learn(setting(model, tmp_path, streamed=streamed, device=GPU), GPU)
    for mine, theirs in zip(found[:2], wanted[:2], strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 2e-3
    assert found[2] == pytest.approx(wanted[2], rel=1e-3)


@pytest.mark.parametrize("budget", [None, 0])
def test_in_bf16_streamed_is_resident(model: Path, tmp_path: Path, budget: int | None) -> None:
    kept = {"device": GPU, "dtype": torch.bfloat16}
    wanted = _learn(setting(model, tmp_path, **kept), GPU)  # type: ignore[arg-type]
    found = _learn(setting(model, tmp_path, streamed=True, budget=budget, **kept), GPU)  # type: ignore[arg-type]
    for mine, theirs in zip(found[:2], wanted[:2], strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-2


def test_a_layer_stays_until_its_kernels_are_done(tmp_path: Path) -> None:
    """Kernels of a layer wait on the GPU while the next one is read: its memory must not be filled meanwhile."""
    sizes = {
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 6,
        "head_dim": 64,
        "num_attention_heads": 16,
        "max_position_embeddings": 512,
    }
    folder = saved("qwen3_moe", tmp_path / "student", dtype=torch.bfloat16, scale=1.0, **sizes)
    text = made_up_text(1024, seed=1)  # 16,384 tokens in one batch
    found = []
    for streamed in (False, True):
        each = setting(folder, tmp_path, streamed=streamed, device=GPU, dtype=torch.bfloat16)
        disturb(each.bank, 0.001)
        each.engine.accumulate_gradients([text.take(np.arange(1024), GPU)], each.head, len(text.position))
        found.append((each.bank.gradient.cpu(), float(each.head.loss)))
        each.decoder.close()
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)
    assert float((found[1][0] - found[0][0]).norm() / found[0][0].norm()) < 5e-2


@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_in_bf16_learns(tmp_path: Path, streamed: bool) -> None:
    folder = saved("qwen3_moe", tmp_path / "student", dtype=torch.bfloat16)
    found = setting(folder, tmp_path, streamed=streamed, settings=SETTINGS, device=GPU, dtype=torch.bfloat16)
    outcome = found.training(made_up_text(16, 1), made_up_text(6, 2), SETTINGS).complete()
    curve = [point.kl for point in outcome.curve]
    assert min(curve) < 0.95 * curve[0]


@pytest.mark.parametrize("size", [3, 1 << 16, 1_000_003])
def test_staged_copies_are_exact(size: int) -> None:
    staging = Staging(buffer_bytes=1 << 18)
    sources = [torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16) for seed in range(5)]
    targets = [torch.full_like(source, torch.nan, device=GPU) for source in sources]
    for target, source in zip(targets, sources, strict=True):
        copy = source.clone()
        staging.copy(target, copy)
        copy.fill_(torch.nan)  # it may go once the call returns
    torch.cuda.synchronize()
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target.cpu(), source)
    wide = torch.zeros(size, device=GPU)
    staging.copy(wide, sources[0])
    assert torch.equal(wide.cpu(), sources[0].float())


def test_processes_add_up_on_both_kinds_of_device(tmp_path: Path) -> None:
    group = Distributed(0, 1, f"file://{tmp_path}/meeting", GPU)
    try:
        on_gpu, on_cpu = torch.ones(3, device=GPU), torch.full((), 2.0, dtype=torch.float64)
        group.add_up(on_gpu, on_cpu)
        assert on_gpu.tolist() == [1.0] * 3
        assert on_cpu.item() == 2.0
    finally:
        group.close()


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_the_refined_stage_from_end_to_end(tmp_path: Path, placement: str) -> None:
    student = student_with_tokenizer("qwen3_moe", tmp_path / "student", trained_tokenizer(tmp_path / "tokenizer", 400))
    teacher = teacher_with_other_head(student, tmp_path / "teacher")
    training = TRAINED["training"] | {"learning_rate": "auto", "placement": placement}
    values = TRAINED | {"copies": "auto", "devices": ["cuda:0"], "training": training}
    adapter = distill(recipe_for(teacher, student, tmp_path / "out", **values))
    verify(adapter.folder)
    facts = adapter.record.content["refinement"]
    assert facts["placement"]["dtype"] == "bfloat16"
    assert facts["peak_device_bytes"] > 0
    assert facts["curve"][facts["best"]]["kl"] < 0.9 * facts["curve"][0]["kl"]
    assert adapter.record.content["transferred"]


def test_a_run_goes_on_from_its_save(tmp_path: Path) -> None:
    from moe_svd_distill.training.progress import Progress, TrainingCheckpoints

    folder = saved("qwen3_moe", tmp_path / "student", dtype=torch.float32)
    text, check = made_up_text(16, 1), made_up_text(6, 2)
    whole = setting(folder, tmp_path, settings=SETTINGS, device=GPU).training(text, check, SETTINGS).complete()

    def stop(progress: Progress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    first = setting(folder, tmp_path, settings=SETTINGS, device=GPU)
    with pytest.raises(KeyboardInterrupt):
        first.training(text, check, SETTINGS).complete(TrainingCheckpoints(tmp_path, "run", every_s=0.0), stop)
    second = setting(folder, tmp_path, settings=SETTINGS, device=GPU)
    outcome = second.training(text, check, replace(SETTINGS)).complete(
        TrainingCheckpoints(tmp_path, "run", every_s=0.0)
    )
    assert outcome.resumed_at == 4
    # Sums on a GPU may differ in their last bits from run to run.
    for mine, theirs in zip(outcome.curve, whole.curve, strict=True):
        assert mine.kl == pytest.approx(theirs.kl, rel=1e-2)
