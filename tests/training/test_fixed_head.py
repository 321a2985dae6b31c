from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_svd_distill.algebra.divergence import LogitTransform, cross_entropy, kl_divergence, top1_agreement
from moe_svd_distill.algebra.whitening import whitening
from moe_svd_distill.streaming import Head
from moe_svd_distill.training import fixed_head
from moe_svd_distill.training.fixed_head import FixedHead, teacher_expectations
from moe_svd_distill.training.head import TrainedHead
from moe_svd_distill.training.settings import TrainingSettings
from tests.support.training import CPU, TEACHER_WIDTH, VOCABULARY, made_up_text

WIDTH = 12
FIXED = TrainingSettings(epochs=1, step_tokens=64, batch_tokens=64, rate=1.0, head_rate=1.0, head="fixed")


def _heads(multiplier: float, bias: bool) -> tuple[Head, Head]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    shift = torch.randn(VOCABULARY, generator=generator) if bias else None
    student = Head(weight, shift, LogitTransform(multiplier))
    return student, Head(torch.randn(VOCABULARY, TEACHER_WIDTH, generator=generator), None, LogitTransform())


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize(("multiplier", "bias"), [(1.0, False), (0.5, True)])
def test_loss_slope_and_divergence_are_those_of_the_whole_distributions(
    share: float, multiplier: float, bias: bool, tmp_path: Path
) -> None:
    student, teacher = _heads(multiplier, bias)
    basis = torch.randn(4 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(2))
    plain = TrainedHead(student, teacher, whitening(basis.T @ basis), replace(FIXED, cross_entropy_share=share))
    short = FixedHead(student)
    text = made_up_text(6, seed=4)
    order = np.array([4, 1, 5])
    with (
        short.with_expectations(text, teacher, share, tmp_path, "text") as (expected, best),
        short.with_expectations(text, teacher, 0.0, tmp_path, "check") as (measured, _),
    ):
        assert expected.teacher.shape == (len(text.position), WIDTH + 1)
        batch, brief = text.take(order, CPU), expected.take(order, CPU)
        states = torch.randn(len(batch.position), WIDTH, generator=torch.Generator().manual_seed(7))
        slopes = [head.accumulate_gradients(states, part, 50) for head, part in ((plain, batch), (short, brief))]
        torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-5)
        assert float(short.loss) == pytest.approx(float(plain.loss), rel=1e-5)
        assert not short.values.numel()
        divergence = short.divergence(states, measured.take(order, CPU))
        assert float(divergence) == pytest.approx(float(plain.divergence(states, batch)), rel=1e-5)
        assert list(tmp_path.iterdir())
        logits = teacher.logits(text.teacher[torch.from_numpy(text.teacher_position)])
        assert torch.equal(best, logits.argmax(dim=-1))
    assert not list(tmp_path.iterdir())


def test_products_of_16_bits_are_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = _heads(1.0, bias=True)
    monkeypatch.setattr(fixed_head, "_LARGE", 1)
    monkeypatch.setattr(fixed_head, "matmul_dtype", lambda device: torch.bfloat16)
    rounded, plain = FixedHead(student), FixedHead(student)
    plain.products = student.weight
    assert rounded.products.dtype == torch.bfloat16
    text, order = made_up_text(6, seed=4), np.arange(6)
    with plain.with_expectations(text, teacher, 0.0, tmp_path, "wide") as (wide, _):
        batch = wide.take(order, CPU)
        states = torch.randn(len(batch.position), WIDTH, generator=torch.Generator().manual_seed(7))
        slopes = [head.accumulate_gradients(states, batch, len(states)) for head in (rounded, plain)]
        near = torch.nn.functional.cosine_similarity(slopes[0], slopes[1], dim=-1)
        assert float(near.min()) > 0.999
        assert float(rounded.loss) == pytest.approx(float(plain.loss), rel=0.01)


def test_figures_are_those_of_both_distributions(tmp_path: Path) -> None:
    student, teacher = _heads(0.5, bias=True)
    text, generator = made_up_text(6, seed=4), torch.Generator().manual_seed(7)
    states = torch.randn(len(text.position), WIDTH, generator=generator)
    target = torch.randint(VOCABULARY, (len(states),), generator=generator)
    with FixedHead(student).with_expectations(text, teacher, 0.0, tmp_path, "search") as (expected, best):
        found = FixedHead(student).figures(states, expected.teacher, best, target)
    wanted, given = teacher.logits(text.teacher[torch.from_numpy(text.teacher_position)]), student.logits(states)
    plain = [kl_divergence(wanted, given), cross_entropy(given, target), top1_agreement(wanted, given).float()]
    torch.testing.assert_close(found, torch.stack(plain), rtol=1e-4, atol=1e-4)


def test_rows_are_the_plain_formula() -> None:
    student, teacher = _heads(2.0, bias=True)
    states = torch.randn(5, TEACHER_WIDTH, generator=torch.Generator().manual_seed(8))
    following = torch.tensor([3, -1, 0, 7, -1])
    found = teacher_expectations(teacher.logits(states), following, student, 0.4)
    p = torch.softmax(states.double() @ teacher.weight.double().T, dim=-1)
    real = torch.where(following >= 0, 0.4, 0.0)[:, None].double()
    mixed = (1 - real) * p + real * torch.nn.functional.one_hot(following.clamp_min(0), VOCABULARY)
    constant = (1 - real[:, 0]) * (p * p.log()).sum(-1) - 2 * mixed @ student.bias.double()  # type: ignore[union-attr]
    torch.testing.assert_close(found[:, :-1].double(), 2 * mixed @ student.weight.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, -1].double(), constant, rtol=1e-4, atol=1e-4)
