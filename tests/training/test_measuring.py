"""Which places are judged, and by which figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_svd_distill.algebra.logits import LogitTransform
from moe_svd_distill.calibration.paired import PairedText
from moe_svd_distill.calibration.text import TokenizedText
from moe_svd_distill.streaming import Head
from moe_svd_distill.training import measuring
from moe_svd_distill.training.measuring import StatePairs, measure_states, predicting_places

NAMES = tuple("abcdefghij")


def _text(sequences: np.ndarray, documents: np.ndarray) -> TokenizedText:
    names = NAMES[: int(documents.max()) + 1]
    return TokenizedText(sequences, documents, names, names)


def _alike(sequences: np.ndarray, documents: np.ndarray, vocabulary: int) -> PairedText:
    text = _text(sequences, documents)
    positions, ids = np.arange(sequences.size), np.arange(vocabulary)
    return PairedText(text, text, positions, positions, ids, ids)


def test_the_last_place_of_a_sequence_predicts_nothing() -> None:
    sequences = np.arange(12).reshape(3, 4)
    places = predicting_places(_alike(sequences, np.repeat([[0], [1], [2]], 4, axis=1), 12))
    assert places.student_position.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert places.teacher_position.tolist() == places.student_position.tolist()
    assert places.target.tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert places.unit.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # few documents: sequences are the units


def test_padding_and_tokens_of_one_model_alone_are_no_targets() -> None:
    student = _text(
        np.array([[5, 6, 7, 8, 0], [9, 5, 3, 6, 7]]),
        np.array([[0, 0, 0, 1, -1], [1, 1, 2, 2, 2]]),
    )
    teacher = _text(np.array([[1, 2, 3, 4, 4], [1, 2, 2, 3, 4]]), np.zeros((2, 5), dtype=np.int64))
    # the student has read what the teacher has at 0, 1, 2 | 4 would predict padding, 3 follows nothing known
    text = PairedText(
        student,
        teacher,
        np.array([0, 1, 2, 3, 5, 6, 7, 8, 9]),
        np.array([1, 2, 3, 4, 5, 7, 7, 8, 9]),
        np.array([5, 6, 7, 9]),
        np.array([50, 60, 70, 90]),
    )
    places = predicting_places(text)
    # 0 → 6, 1 → 7, 2 → 8 (unknown), 3 → padding, 5 → 5, 6 → 3 (unknown), 7 → 6, 8 → 7, 9 ends its sequence
    assert places.student_position.tolist() == [0, 1, 5, 7, 8]
    assert places.teacher_position.tolist() == [1, 2, 5, 7, 8]
    assert [int(text.student_ids[target]) for target in places.target] == [6, 7, 5, 6, 7]
    assert places.unit.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(1.5, 3.0)])
def test_figures_are_the_plain_formulas_summed_by_document(
    transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    vocabulary, count, length = 17, 6, 20
    documents = np.sort(np.concatenate([np.arange(10), rng.integers(0, 10, count * length - 10)]))
    text = _alike(rng.integers(0, vocabulary, (count, length)), documents.reshape(count, length), vocabulary)
    mine, theirs = (torch.randn(count * length, width, generator=generator) for width in (8, 12))
    student, teacher = (
        Head(torch.randn(vocabulary, width, generator=generator), offset, transform)
        for width, offset in ((8, torch.randn(vocabulary, generator=generator)), (12, None))
    )
    places = predicting_places(text)
    pairs = StatePairs(mine, theirs, places.student_position, places.teacher_position)
    monkeypatch.setattr(measuring, "_LOGIT_BYTES", 4 * vocabulary * 13)  # several pieces
    found = measure_states(pairs, places, student, teacher)
    assert len(found.tokens) == 10
    p, q = (
        replace(head, weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())
        .logits(states[position])
        .log_softmax(-1)
        for head, states, position in (
            (teacher, theirs, places.teacher_position),
            (student, mine, places.student_position),
        )
    )
    kl, entropy = (p.exp() * (p - q)).sum(-1), -q[torch.arange(len(q)), places.target]
    agreement = p.argmax(-1) == q.argmax(-1)
    for document in range(10):
        inside = places.unit == document
        assert found.tokens[document] == inside.sum()
        assert found.kl[document] == pytest.approx(float(kl[inside].sum()), rel=1e-5)
        assert found.cross_entropy[document] == pytest.approx(float(entropy[inside].sum()), rel=1e-5)
        assert found.agreement[document] == int(agreement[inside].sum())


def test_states_are_read_in_order_and_in_float32() -> None:
    student, teacher = torch.arange(40.0).reshape(10, 4), -torch.arange(20.0).reshape(10, 2)
    pairs = StatePairs(student.half(), teacher, np.array([9, 1, 3, 5, 0]), np.array([0, 2, 4, 9, 8]))
    assert len(pairs) == 5
    pieces = list(pairs.in_order(2, torch.device("cpu")))
    assert [len(mine) for mine, _ in pieces] == [2, 2, 1]
    assert torch.equal(torch.cat([mine for mine, _ in pieces]), student[[9, 1, 3, 5, 0]])
    assert torch.equal(torch.cat([theirs for _, theirs in pieces]), teacher[[0, 2, 4, 9, 8]])
