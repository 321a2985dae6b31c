from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from moe_svd_distill.adapter.publication import new_folder
from moe_svd_distill.errors import CannotWriteError


def test_a_folder_appears_at_the_end_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with new_folder(path) as folder:
        (folder / "a").write_text("x")
        assert not path.exists()
        assert folder.parent == path.parent
    assert (path / "a").read_text() == "x"
    assert path.stat().st_mode & 0o777 == 0o755
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with suppress(RuntimeError, KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_refusal_of_the_system_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotWriteError, match=r"annot (write|be written)"), new_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(CannotWriteError, match="not an empty folder"), new_folder(tmp_path / "file"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
