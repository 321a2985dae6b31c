"""Distances of next-token distributions against float64."""

import pytest
import torch

from moe_svd_distill.algebra import divergence
from moe_svd_distill.algebra.divergence import cross_entropy, divergence_and_gradient, kl_divergence, top1_agreement


def logits(tokens: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return 8 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("entries", [1, 1 << 24])
def test_kl_divergence_is_the_plain_formula(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "CHUNK_ENTRIES", entries)
    teacher, student = logits(6, 5000), logits(6, 5000, seed=1)
    p, q = (tensor.double().log_softmax(-1) for tensor in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(kl_divergence(teacher, student).double(), expected, rtol=1e-5, atol=1e-5)


def test_kl_divergence_of_nearly_equal_distributions_keeps_its_digits() -> None:
    teacher = logits(4, 150_000)
    student = teacher + 1e-2 * logits(4, 150_000, seed=1) / 8
    p, q = (tensor.double().log_softmax(-1) for tensor in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(kl_divergence(teacher, student).double(), expected, rtol=0.05, atol=1e-6)
    assert not kl_divergence(teacher, teacher).any()


def test_words_that_are_ruled_out() -> None:
    never = float("-inf")
    teacher = torch.tensor([[0.0, 0.0, never], [0.0, 0.0, 0.0]])
    student = torch.tensor([[0.0, 0.0, never], [0.0, never, 0.0]])
    found = kl_divergence(teacher, student)
    assert float(found[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(found[1]) == float("inf")


def test_a_shift_of_all_logits_changes_nothing() -> None:
    teacher, student = logits(3, 100), logits(3, 100, seed=1)
    torch.testing.assert_close(
        kl_divergence(teacher + 500, student - 500), kl_divergence(teacher, student), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_the_plain_formula(dtype: torch.dtype) -> None:
    values = logits(7, 3000).to(dtype)
    targets = torch.tensor([0, 5, 2999, 7, 1, 1, 42], dtype=torch.int32)
    expected = torch.nn.functional.cross_entropy(values.double(), targets.long(), reduction="none")
    torch.testing.assert_close(cross_entropy(values, targets).double(), expected, rtol=1e-5, atol=1e-5)


def test_top1_agreement() -> None:
    teacher = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    student = torch.tensor([[0.0, 9.0], [0.0, 9.0]])
    assert top1_agreement(teacher, student).tolist() == [True, False]


def test_no_tokens_give_no_figures() -> None:
    empty = torch.zeros(0, 10)
    assert kl_divergence(empty, empty).shape == (0,)
    assert cross_entropy(empty, torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert top1_agreement(empty, empty).shape == (0,)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon", "skewed"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_gradients_of_divergences_are_those_of_autograd(kind: str, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(7, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    following = torch.tensor([3, -1, 0, 10, -1, 5, 5])
    student.requires_grad_()
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    p, q = log_p.exp(), log_q.exp()
    middle = ((p + q) / 2).log()
    plain = {
        "forward": (p * (log_p - log_q)).sum(-1),
        "reverse": (q * (log_q - log_p)).sum(-1),
        "jensen-shannon": ((p * (log_p - middle)).sum(-1) + (q * (log_q - middle)).sum(-1)) / 2,
        "skewed": (p * (log_p - (0.1 * p + 0.9 * q).log())).sum(-1),
    }[kind]
    entropy = -log_q.gather(1, following.clamp_min(0)[:, None])[:, 0]
    wanted = torch.where(following >= 0, (1 - share) * plain + share * entropy, plain)
    wanted.sum().backward()
    with torch.no_grad():
        loss, gradient = divergence_and_gradient(teacher, student, kind, following, share)
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(gradient, student.grad)
