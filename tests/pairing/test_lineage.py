"""From figures to a verdict, and from a verdict to stages."""

from __future__ import annotations

import json

import pytest

from moe_svd_distill.pairing.lineage import (
    Comparison,
    Lineage,
    Probe,
    Relatedness,
    SizeDifference,
    Vocabularies,
    VocabularyRelation,
    choose_method,
    judge,
)


def probe(
    role: str, cosine: float, comparison: Comparison = Comparison.IN_PLACE, *, chance: float = 0.0, spread: float = 0.1
) -> Probe:
    return Probe(role, f"t.{role}", f"s.{role}", comparison, 64, cosine, chance, spread, cosine == 1.0)


def relatedness(
    lineage: Lineage,
    vocabulary: Vocabularies = Vocabularies.EQUAL,
    differences: tuple[SizeDifference, ...] = (),
    families: tuple[str, str] = ("llama", "llama"),
) -> Relatedness:
    numbers = VocabularyRelation(vocabulary, 96)
    return Relatedness(families, differences, numbers, (probe("head", 0.5),), (), lineage, "because", (1, 1))


ALIKE = (probe("embedding", 0.9), probe("attention.q", 0.8))
MOVED = (probe("embedding", 0.9, Comparison.CHANNELS), probe("attention.q", 0.8, Comparison.ROWS))
PERMUTED = (probe("embedding", 0.9), probe("attention.q", 0.01), probe("attention.q", 0.8, Comparison.ROWS))
VERDICTS = [
    ("identical", (probe("embedding", 1.0), probe("router", 1.0)), True, True, Lineage.SAME),
    ("identical samples, other rows differ", (probe("embedding", 1.0), probe("router", 1.0)), True, False, Lineage.ONE),
    ("alike, same shape", ALIKE, True, False, Lineage.ONE),
    ("heads permuted", PERMUTED, True, False, Lineage.ONE),
    ("alike, fewer layers", ALIKE, False, False, Lineage.CROPPED),
    ("channels moved", MOVED, True, False, Lineage.CROPPED),
    ("channels moved, narrower", MOVED, False, False, Lineage.CROPPED),
    ("embeddings only", (probe("embedding", 0.9), probe("attention.q", 0.0)), True, False, Lineage.CROPPED),
    ("nothing", (probe("embedding", 0.05), probe("attention.q", 0.01)), True, False, Lineage.INDEPENDENT),
    ("high, and by chance", (probe("head", 0.7, chance=0.65),), False, False, Lineage.INDEPENDENT),
    ("high, within the spread", (probe("head", 0.5, spread=0.4),), True, False, Lineage.INDEPENDENT),
    ("nothing measured", (), True, False, Lineage.UNKNOWN),
]


@pytest.mark.parametrize(
    ("name", "probes", "same", "all_alike", "expected"), VERDICTS, ids=[row[0] for row in VERDICTS]
)
def test_the_verdict(name: str, probes: tuple[Probe, ...], same: bool, all_alike: bool, expected: Lineage) -> None:
    verdict, reason = judge(probes, same_shape=same, all_alike=all_alike)
    assert verdict is expected, reason
    assert reason


E, P, D, U = Vocabularies.EQUAL, Vocabularies.PADDED, Vocabularies.DIFFERENT, Vocabularies.UNKNOWN
CHOICES = [
    (Lineage.SAME, E, True, (), "nothing to transfer"),
    (Lineage.SAME, E, False, (), "nothing to transfer"),
    (Lineage.ONE, E, False, ("weights",), "no text was given"),
    (Lineage.ONE, E, True, ("weights", "calibrated"), "one lineage"),
    (Lineage.ONE, P, True, ("weights", "calibrated"), "one lineage"),
    (Lineage.ONE, D, True, ("weights",), "vocabularies differ"),
    (Lineage.ONE, U, True, ("weights",), "vocabularies are unknown"),
    (Lineage.CROPPED, E, True, ("calibrated",), "cropped"),
    (Lineage.CROPPED, E, False, (), "no text was given"),
    (Lineage.INDEPENDENT, E, True, ("calibrated",), "independent"),
    (Lineage.INDEPENDENT, P, True, ("calibrated",), "independent"),
    (Lineage.INDEPENDENT, E, False, (), "no text was given"),
    (Lineage.INDEPENDENT, D, True, (), "vocabularies differ"),
    (Lineage.INDEPENDENT, D, False, (), "no text was given"),
    (Lineage.INDEPENDENT, U, True, (), "vocabularies are unknown"),
    (Lineage.UNKNOWN, E, True, ("calibrated",), "not known"),
    (Lineage.UNKNOWN, E, False, (), "no text was given"),
]


@pytest.mark.parametrize(("lineage", "vocabulary", "has_text", "stages", "named"), CHOICES)
def test_the_choice_and_its_reason(
    lineage: Lineage, vocabulary: Vocabularies, has_text: bool, stages: tuple[str, ...], named: str
) -> None:
    choice = choose_method(relatedness(lineage, vocabulary), has_text)
    assert choice.stages == stages
    assert named in choice.reason


def test_weights_are_never_chosen_for_pairs_they_harm() -> None:
    for lineage in (Lineage.CROPPED, Lineage.INDEPENDENT, Lineage.UNKNOWN):
        for vocabulary in Vocabularies:
            for has_text in (True, False):
                choice = choose_method(relatedness(lineage, vocabulary), has_text)
                assert "weights" not in choice.stages
                assert choice.stages or "nothing or harm" in choice.reason


def test_the_vocabulary_alone_does_not_make_shapes_differ() -> None:
    assert relatedness(Lineage.ONE, differences=(SizeDifference("vocabulary", 96, 128),)).same_shape
    assert not relatedness(Lineage.ONE, differences=(SizeDifference("hidden", 64, 32),)).same_shape
    assert not relatedness(Lineage.ONE, families=("llama", "qwen3")).same_shape


def test_it_is_json() -> None:
    content = json.loads(json.dumps(relatedness(Lineage.CROPPED).as_dict()))
    assert content["lineage"] == "possibly cropped lineage"
    assert content["vocabulary"]["kind"] == "equal"
    assert content["probes"][0]["deviations"] == 5.0
    assert content["same_shape"] is True
