"""Figures of a pair with different tokenizers."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_svd_distill.algebra.figures import Measurement
from moe_svd_distill.calibration.documents import Document, without
from moe_svd_distill.calibration.paired import PairTokenizers
from moe_svd_distill.calibration.reading import read_text
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import BadDataError, IncompatiblePairError
from moe_svd_distill.evaluation import from_states
from moe_svd_distill.evaluation.evaluate import evaluate
from moe_svd_distill.evaluation.request import EvaluationRequest
from moe_svd_distill.evaluation.result import Evaluation
from moe_svd_distill.streaming import ScaledAdapter, load_head, stream_states
from moe_svd_distill.training.measuring import predicting_places
from tests.support.language import LENGTH, Lab, documents, llama, qwen3_moe
from tests.support.tiny import random_pairs, save_adapter
from tests.support.tokenizers import byte_level, sentencepiece

TOKENS = 3000
LAB_TEXT = Path(__file__).parents[2] / "lab" / "text" / "heldout.jsonl"


@dataclass(frozen=True)
class Unequal:
    """A pair with a tokenizer each, an adapter on everything the student has, and text."""

    teacher: Path
    student: Path
    adapter: Path
    documents: tuple[Document, ...]


def _model(folder: Path, model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.add_(0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)).mul_(3)
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Unequal:
    folder = tmp_path_factory.mktemp(request.param)
    read = tuple(Document(one.source, one.text[:1500]) for one in read_text([LAB_TEXT]).documents[:60])
    texts = [one.text for one in read]
    byte_level(folder / "student", texts, 400)
    (byte_level if request.param == "byte-level" else sentencepiece)(folder / "teacher", texts, 600)
    # More rows than tokens, as heads on the hub have.
    _model(folder / "student", llama(416, tie_word_embeddings=False), 1)
    _model(folder / "teacher", qwen3_moe(640, hidden_size=48), 2)
    pairs = random_pairs(folder / "student", dtype=torch.float32)
    save_adapter(folder / "adapter", folder / "student", pairs)
    return Unequal(folder / "teacher", folder / "student", folder / "adapter", read)


def _evaluate(pair: Unequal, mode: Any, cache: Path, **changes: Any) -> Evaluation:
    read, calibration = changes.pop("documents", pair.documents[:40]), changes.pop("calibration", ())
    settings = {"tokens": TOKENS, "length": LENGTH, "mode": mode, "cache": cache, "vocabulary": "shared"}
    request = EvaluationRequest(pair.adapter, **(settings | changes))
    return evaluate(request, pair.teacher, pair.student, read, calibration)


def test_figures_are_those_over_the_common_tokens(pair: Unequal, tmp_path: Path) -> None:
    calibration = pair.documents[40:]
    results = [_evaluate(pair, mode, tmp_path / mode, calibration=calibration) for mode in ("resident", "streamed")]
    resident, streamed = results
    assert streamed.places == {"teacher": "streamed", "student": "streamed"}
    assert len(streamed.kept_states) == 2
    tokenizers = PairTokenizers(pair.teacher, pair.student, "shared")
    text = tokenizers.parts(pair.documents[:40], {"held-out": TOKENS}, length=LENGTH)["held-out"]
    expected = {adapter: _expected(pair, text, tmp_path / "own", adapter) for adapter in (None, pair.adapter)}
    mass = _teacher_mass(pair, text, tmp_path / "own")
    for result in results:
        for adapter, figures in ((None, result.student), (pair.adapter, result.adapted)):
            sums = expected[adapter]
            tokens = sums.tokens.sum()
            assert figures.tokens == tokens
            assert figures.documents == len(sums.tokens)
            assert figures.kl == pytest.approx(sums.kl.sum() / tokens, rel=1e-4)
            assert figures.cross_entropy == pytest.approx(sums.cross_entropy.sum() / tokens, rel=1e-4)
            assert figures.top1_agreement == pytest.approx(sums.agreement.sum() / tokens, abs=2e-3)
        assert result.student.kl != pytest.approx(result.adapted.kl, rel=1e-3)
        assert result.controls[0].figures.tokens == result.student.tokens
        assert result.temperature_control is not None
        assert result.temperature_control.fitted_on == "calibration text"
        assert result.vocabulary == len(text.student_ids)
        assert result.aligned is not None
        assert result.aligned.common_tokens == len(text.student_ids)
        assert result.aligned.places == result.student.tokens
        assert result.aligned.places_share == pytest.approx(result.student.tokens / text.student.predicted)
        assert 0.3 < result.aligned.places_share < 1
        assert result.aligned.teacher_mass == pytest.approx(mass, rel=1e-4)
        assert 0.1 < mass < 0.99
        assert result.verdict.endswith(result.aligned.note)
        assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["aligned"]["places"] == result.student.tokens
    assert resident.effect == streamed.effect


def _expected(pair: Unequal, text: Any, cache: Path, adapter: Path | None) -> Measurement:
    """The plain formulas in float64, from streamed states."""
    places = predicting_places(text)
    applied = None if adapter is None else ScaledAdapter(adapter)
    with open_checkpoint(pair.teacher) as teacher, open_checkpoint(pair.student) as student:
        mine = stream_states(student, text.student.sequences, cache, adapter=applied).rows(slice(None)).flatten(0, 1)
        theirs = stream_states(teacher, text.teacher.sequences, cache).rows(slice(None)).flatten(0, 1)
        found = load_head(student, dtype=torch.float64, adapter=applied).logits(mine[places.student_position])
        wanted = load_head(teacher, dtype=torch.float64).logits(theirs[places.teacher_position])
    found, wanted = found[:, text.student_ids].log_softmax(-1), wanted[:, text.teacher_ids].log_softmax(-1)
    columns = [
        (wanted.exp() * (wanted - found)).sum(-1),
        -found[torch.arange(len(found)), places.target],
        (wanted.argmax(-1) == found.argmax(-1)).double(),
    ]
    return Measurement.of_tokens(torch.stack(columns).numpy(), places.unit)


def _teacher_mass(pair: Unequal, text: Any, cache: Path) -> float:
    with open_checkpoint(pair.teacher) as teacher:
        states = stream_states(teacher, text.teacher.sequences, cache).rows(slice(None)).flatten(0, 1)
        logits = load_head(teacher).logits(states[predicting_places(text).teacher_position])
    return float(torch.softmax(logits.double(), -1)[:, text.teacher_ids].sum(-1).mean())


def test_small_chunks_give_the_same(pair: Unequal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _evaluate(pair, "resident", tmp_path, controls=0)
    monkeypatch.setattr(from_states, "LOGIT_BYTES", 4 * 7 * 400)
    cut = _evaluate(pair, "resident", tmp_path, controls=0)
    assert cut.adapted.kl == pytest.approx(whole.adapted.kl, rel=1e-5)
    assert cut.temperature_control is not None
    assert whole.temperature_control is not None
    assert cut.temperature_control.temperature == pytest.approx(whole.temperature_control.temperature, rel=1e-4)
    assert cut.aligned is not None
    assert whole.aligned is not None
    assert cut.aligned.teacher_mass == pytest.approx(whole.aligned.teacher_mass, rel=1e-5)


def test_without_being_asked_the_pair_is_refused(pair: Unequal, tmp_path: Path) -> None:
    with pytest.raises(IncompatiblePairError, match="set vocabulary: shared"):
        _evaluate(pair, "resident", tmp_path, vocabulary="equal")


def test_used_documents_are_left_out(pair: Unequal, tmp_path: Path) -> None:
    used = {document.digest for document in pair.documents[:40]}
    with pytest.raises(BadDataError, match="All of the text was used"):
        _evaluate(pair, "resident", tmp_path, documents=without(pair.documents[:40], used))


def test_a_teacher_that_only_numbers_its_tokens_otherwise_is_reached(lab: Lab, tmp_path: Path) -> None:
    renumbered = _renumbered(lab.teacher, tmp_path / "teacher")
    request = EvaluationRequest(lab.good_adapter, length=LENGTH, controls=0, tokens=4000)
    text = documents(40, seed=9)
    result = evaluate(replace(request, vocabulary="shared"), renumbered, lab.student, text)
    assert result.effect == "helps"
    assert result.adapted.kl < 1e-4
    assert result.gap_closed.kl == pytest.approx(100, abs=0.1)
    assert result.aligned is not None
    assert result.aligned.places_share > 0.95
    assert result.teacher.cross_entropy == pytest.approx(result.adapted.cross_entropy, abs=1e-3)
    # The text is packed otherwise, and its ends are not predicted: close to the figures of equal numbers, not equal.
    equal = evaluate(request, lab.teacher, lab.student, text)
    assert result.student.kl == pytest.approx(equal.student.kl, rel=0.1)


def test_equal_numbers_take_the_same_way_in_both_modes(lab: Lab) -> None:
    equal = EvaluationRequest(lab.good_adapter, length=LENGTH, vocabulary="equal", tokens=1000)
    results = [
        evaluate(request, lab.teacher, lab.student, documents(20, seed=9)).as_dict() | {"seconds": 0}
        for request in (equal, replace(equal, vocabulary="shared"))
    ]
    assert results[0] == results[1]
    assert results[0]["aligned"] is None


def _renumbered(model: Path, folder: Path) -> Path:
    """The same model with its tokens in another order, the special one first as it was."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    order = list(range(1, len(vocabulary)))
    random.Random(3).shuffle(order)
    new = np.asarray([0, *order])  # old number → new number
    content["model"]["vocab"] = {token: int(new[number]) for token, number in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = weights[name].clone()
        moved[torch.from_numpy(new)] = weights[name][: len(new)]
        weights[name] = moved
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
