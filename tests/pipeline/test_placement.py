from dataclasses import replace
from pathlib import Path

import pytest

from moe_svd_distill.execution.supervisor import ExecutionSettings
from moe_svd_distill.pipeline.pair import open_pair
from moe_svd_distill.pipeline.placement import place_training
from moe_svd_distill.pipeline.schedule import schedule_refined
from moe_svd_distill.pipeline.texts import TextSize
from moe_svd_distill.pipeline.trained_matrices import trained_numbers
from moe_svd_distill.training.settings import Placement
from tests.support.models import saved
from tests.support.pairs import LITTLE_TEXT, recipe_for
from tests.support.training import pairs_of, setting


def _place(tiny: tuple[Path, Path], tmp_path: Path, workers: int, together: int, tokens: int) -> Placement:
    recipe = recipe_for(*tiny, tmp_path, **LITTLE_TEXT)
    with open_pair(*map(str, tiny)) as pair:
        text = TextSize(tokens, together, tokens // together, tokens, identical=True, rows=1)
        schedule = schedule_refined(recipe, pair.student, ("refined",), text, "cpu")
        settings = replace(schedule.settings, step_tokens=tokens, head="whole")
        return place_training(
            recipe, pair, ExecutionSettings(workers), replace(schedule, settings=settings, sequences=together)
        )


@pytest.mark.parametrize(
    ("asked", "workers", "together", "tokens", "processes", "threads"),
    [
        (None, 4, 8, 4096, 4, 2),  # eight cores
        (None, 4, 1, 4096, 1, 8),  # a step of one sequence is not shared
        (None, 3, 2, 1024, 2, 4),
        (None, 4, 8, 1500, 2, 4),  # less than 512 tokens for a third
        (None, 4, 2, 512, 1, 8),
        ("2", 4, 8, 4096, 4, 1),
        ("1", 1, 8, 4096, 1, 1),  # fewer threads than cores if the environment says so
    ],
)
def test_processes_share_a_step_and_the_threads(
    tiny: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
    workers: int,
    together: int,
    tokens: int,
    processes: int,
    threads: int,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr("moe_svd_distill.pipeline.placement.available_cores", lambda: 8)
    placed = _place(tiny, tmp_path, workers, together, tokens)
    assert placed.resident
    assert (placed.devices, placed.threads) == (("cpu",) * processes, threads)


@pytest.mark.parametrize("rank", [4, 12, 20, 31, 32, 100])
def test_as_many_numbers_as_move(tmp_path: Path, rank: int) -> None:
    bank = setting(saved("qwen3_moe", tmp_path / "student"), tmp_path, rank=rank).bank
    shapes = {name: (len(b), a.shape[1]) for name, (b, a) in pairs_of(bank)}
    assert trained_numbers(shapes, dict.fromkeys(shapes, rank)) == len(bank.values)
