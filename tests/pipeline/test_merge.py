"""The card of a merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from moe_svd_distill.files.names import CARD_FILE, EVALUATION_FILE, RECORD_FILE
from moe_svd_distill.pipeline.merge import merge
from tests.support import tiny
from tests.support.run_records import content, evaluation


@pytest.mark.parametrize("of_these_bytes", [True, False])
def test_a_merged_model_has_a_card_of_its_own_with_the_figures_of_its_adapter(
    of_these_bytes: bool, tmp_path: Path
) -> None:
    student = tiny.save_student(tmp_path / "student", "qwen3")
    (student / CARD_FILE).write_text("# The student")
    adapter = tiny.save_adapter(tmp_path / "adapter", student, tiny.random_pairs(student))
    run = {key: value for key, value in content(adapter_sha256="a").items() if key != "evaluation"}
    (adapter / RECORD_FILE).write_text(json.dumps(run))
    figures = evaluation() | {"adapter_sha256": "a" if of_these_bytes else "b"}
    (adapter / EVALUATION_FILE).write_text(json.dumps(figures))
    merge(adapter, tmp_path / "merged", student)
    card = (tmp_path / "merged" / CARD_FILE).read_text()
    assert "adapter merged into its weights" in card
    assert ("Closes 34 % of the KL gap" in card) == of_these_bytes
    assert str(tmp_path) not in card
    assert bool(ModelCard(card).data.eval_results) == of_these_bytes


def test_an_adapter_without_a_record_gives_a_short_card(tmp_path: Path) -> None:
    student = tiny.save_student(tmp_path / "student", "qwen3")
    adapter = tiny.save_adapter(tmp_path / "adapter", student, tiny.random_pairs(student))
    merge(adapter, tmp_path / "merged", student)
    assert "has not been evaluated" in (tmp_path / "merged" / CARD_FILE).read_text()
