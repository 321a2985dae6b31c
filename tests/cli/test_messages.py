"""Wrong uses: the exit code, one line, and what to do; docs/messages.md shows them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.wrong_uses import DOCUMENT, WRONG_USES, WrongUse, document, prepare, row, said

STALE = "docs/messages.md is stale; write it anew with: python -m tests.support.wrong_uses"
FOREIGN = re.compile(r"Traceback|Internal error|Input should|pydantic|validation error|\[Errno|NoneType")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize("use", WRONG_USES, ids=[use.words for use in WRONG_USES])
def test_a_wrong_use_is_one_line_with_its_exit_code_and_what_to_do(use: WrongUse, folder: Path) -> None:
    code, line = said(use, folder)
    assert code == use.code, line
    assert use.named in line
    assert not FOREIGN.search(line), line
    assert len(re.findall(r"[.?] [A-Z]", line)) >= 1, f"nothing to do: {line}"
    assert row(use, code, line) in DOCUMENT.read_text(encoding="utf-8").splitlines(), STALE


def test_the_document_has_nothing_else() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(WRONG_USES) == len({use.words for use in WRONG_USES}) >= 60, STALE
    assert text == document(iter(rows)), STALE
