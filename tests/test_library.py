"""The library's face: names, plain paths, the command line's defaults."""

from __future__ import annotations

import inspect
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import click
import pytest

import moe_svd_distill
from moe_svd_distill.cli.commands.evaluate import command
from moe_svd_distill.evaluation.request import EvaluationOptions, EvaluationRequest
from moe_svd_distill.recipe import recipe_yaml
from tests.support.models import saved
from tests.support.pairs import recipe_for


def test_every_public_name_is_there_and_listed() -> None:
    assert set(dir(moe_svd_distill)) == set(moe_svd_distill.__all__)
    assert {"DistillError", "__version__", "distill", "plan", "inspect", "evaluate", "verify", "merge"} <= set(
        dir(moe_svd_distill)
    )
    assert all(getattr(moe_svd_distill, name) is not None for name in dir(moe_svd_distill))
    assert moe_svd_distill.__version__ == version("moe-svd-distill")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moe_svd_distill.nothing


def test_evaluations_have_the_defaults_of_the_command_line() -> None:
    with click.Context(command) as context:
        defaults = {option.name: option.get_default(context) for option in command.params}
    request = EvaluationRequest(Path("a"))
    for name in ("tokens", "controls", "seed", "mode", "dtype"):
        assert defaults[name] == getattr(request, name)
    assert defaults["device"] == inspect.signature(EvaluationRequest).parameters["device"].default == "auto"
    asked = {field.name: hint for field in fields(EvaluationRequest) if (hint := field.type)}
    options = inspect.get_annotations(EvaluationOptions)
    assert {name: hint.__forward_arg__ for name, hint in options.items()} == {
        name: hint for name, hint in asked.items() if name not in ("adapter", "texts")
    }


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_may_be_strings_and_what_comes_back_is_short(kind: type, tmp_path: Path) -> None:
    teacher, student = saved("llama", tmp_path / "t", seed=1), saved("llama", tmp_path / "s", seed=2)
    recipe = recipe_for(teacher, student, tmp_path / "out", rank=2, method="weights")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_yaml(recipe))
    facts = moe_svd_distill.inspect(kind(teacher))
    assert (facts["family"], facts["types"]) == ("llama", {"BF16": facts["tensors"]})
    assert facts["parameters"] > 0
    assert moe_svd_distill.inspect(kind(teacher), kind(student))["relatedness"]["lineage"] == "independent"
    plan = moe_svd_distill.plan(kind(file))
    assert repr(plan).startswith("Plan(weights, about ")
    adapter = moe_svd_distill.distill(kind(file))
    assert repr(adapter) == f"Adapter({str(tmp_path / 'out')!r}, method='weights', not measured)"
    assert moe_svd_distill.load_adapter(kind(adapter.folder)).sha256 == adapter.sha256
    assert moe_svd_distill.verify(kind(adapter.folder)).load is not None
    report = moe_svd_distill.merge(kind(adapter.folder), kind(tmp_path / "merged"))
    assert report.merged > 0
    with pytest.raises(moe_svd_distill.DistillError, match="no text to evaluate on"):
        moe_svd_distill.evaluate(kind(adapter.folder))
