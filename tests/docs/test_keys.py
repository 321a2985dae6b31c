"""Every key and value of a recipe that the manual shows is one that a recipe takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import moe_svd_distill
from docs.generate.recipe import recipe_reference
from moe_svd_distill.errors import UsageError
from moe_svd_distill.recipe import Recipe, parse_recipe
from moe_svd_distill.recipe.model import ExpertSettings, TrainingRecipe
from tests.docs.pages import MANUAL, anchors, blocks, named, spans

KEYS = {
    *Recipe.model_fields,
    *(f"experts.{key}" for key in ExpertSettings.model_fields),
    *(f"training.{key}" for key in TrainingRecipe.model_fields),
}
# Names in files and programs of others, fields of records, and what the program writes.
OTHERS = {
    *("prompt", "completion", "chat_template", "exit_code", "repo_name", "conversation_id", "rank_pattern"),
    *("save_pretrained", "gap_closed", "modules_to_save", "tie_word_embeddings", "lora_alpha", "experts.gate_up_proj"),
}
_SETTING = re.compile(r"([a-z_]+)(?:\.([a-z_]+))?: (\S.*)")
_BASE = {"teacher": "T", "student": "S", "calibration": ["text.jsonl"]}


def check(content: object) -> None:
    """Refuse what a recipe refuses."""
    assert isinstance(content, dict)
    parse_recipe(_BASE | content)


def setting(span: str) -> dict[str, object] | None:
    """What a span such as `training.checks: 3` sets; None for other spans."""
    found = _SETTING.fullmatch(span)
    if found is None:
        return None
    key, inner, value = found.groups()
    read = yaml.safe_load(value)
    return {key: {inner: read} if inner else read}


@pytest.mark.parametrize("page", MANUAL, ids=named)
def test_every_recipe_is_one(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for content in [*(yaml.safe_load(block.code) for block in blocks(text, "yaml")), *map(setting, spans(text))]:
        if content is not None:
            try:
                check(content)
            except UsageError as error:
                pytest.fail(f"{named(page)}: {content}: {error}")


@pytest.mark.parametrize("page", MANUAL, ids=named)
def test_every_name_that_looks_like_a_key_is_one(page: Path) -> None:
    known = KEYS | OTHERS | set(moe_svd_distill.__all__)
    looks = re.compile(r"[a-z]+(?:_[a-z]+)+|(?:training|experts)\.[a-z_]+")
    wrong = [span for span in spans(page.read_text(encoding="utf-8")) if looks.fullmatch(span) and span not in known]
    assert wrong == []


@pytest.mark.parametrize("content", ["tokns: 3", "training:\n  epoch: 2", "method: calibratd", "tokens: few"])
def test_what_a_recipe_does_not_take_is_found(content: str) -> None:
    with pytest.raises(UsageError):
        check(yaml.safe_load(content))
    with pytest.raises(UsageError):
        check(setting("training.epoch: 2"))


def test_the_reference_has_every_key_with_its_meaning() -> None:
    reference = recipe_reference()
    assert {key.replace(".", "-") for key in KEYS} - {"experts", "training"} <= set(anchors(reference))
    assert all((field.description or "")[:20] in reference for field in TrainingRecipe.model_fields.values())
    assert "`auto` or `resident` or `streamed` · default `auto`" in reference
    assert "whole number (at least 512) · default `65536`" in reference
