"""The manual is built without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from docs.generate.hook import on_page_markdown, public_functions
from tests.docs.pages import ROOT


def test_what_leads_out_of_the_manual_is_text_there() -> None:
    page = "[`CONTRIBUTING.md`](../CONTRIBUTING.md), [all](decisions/), [text](text.md), [up](../presets.md)"
    assert (
        on_page_markdown(page) == "`CONTRIBUTING.md`, [all](decisions/index.md), [text](text.md), [up](../presets.md)"
    )


def test_a_mark_that_names_no_reference_is_found() -> None:
    with pytest.raises(KeyError, match="nothing of it"):
        on_page_markdown("<!-- generated: nothing of it -->")


def test_what_a_page_says_in_place_of_its_reference_is_not_on_the_site() -> None:
    page = "Before.\n\n<!-- generated: exit codes -->\nThe table is elsewhere.\n\nBehind."
    built = on_page_markdown(page)
    assert built.startswith("Before.\n\n|")
    assert built.endswith("|\n\nBehind.")
    assert "elsewhere" not in built


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_page_that_is_not_built_says_where_its_reference_is(page: Path) -> None:
    for below in re.findall(r"<!-- generated: .*\n(.*)", page.read_text(encoding="utf-8")):
        assert "`make docs`" in below


def test_every_function_that_is_described_is_where_the_page_looks_for_it() -> None:
    named = re.findall(r"^::: ([\w.]+)\.(\w+)$", public_functions(), re.MULTILINE)
    assert {"plan", "distill", "evaluate"} <= {module.rpartition(".")[2] for module, _ in named}
    for module, name in named:
        assert hasattr(import_module(module), name), f"{module}.{name}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recipe = (tmp_path / "site" / "recipe.html").read_text(encoding="utf-8")
    assert 'id="training-placement"' in recipe
    assert 'id="distill"' in (tmp_path / "site" / "commands.html").read_text(encoding="utf-8")
