"""The training loop on a tiny student: it helps, goes on where it was killed, and stops when it must."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_svd_distill.checkpoints.opening import open_checkpoint
from moe_svd_distill.errors import UsageError
from moe_svd_distill.execution.parts import write_part
from moe_svd_distill.streaming.states_file import write_states
from moe_svd_distill.training.fixed_head import FixedHead
from moe_svd_distill.training.job import TrainingJob
from moe_svd_distill.training.loop import Training
from moe_svd_distill.training.processes import run_training
from moe_svd_distill.training.progress import Progress, TrainingCheckpoints
from moe_svd_distill.training.settings import OptimiserName, Placement, TrainingSettings
from moe_svd_distill.training.text import TextFile
from tests.support.models import saved
from tests.support.training import VOCABULARY, Setting, disturb, made_up_text, pairs_of, setting

SETTINGS = TrainingSettings(epochs=3, step_tokens=64, batch_tokens=32, rate=5e-3, head_rate=5e-3, checks=6, seed=4)


class KilledError(Exception):
    """Stands for a kill between two steps."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("qwen3_moe", tmp_path_factory.mktemp("model") / "student", dtype=torch.float32)


def _values(found: Setting) -> torch.Tensor:
    return torch.cat([found.bank.values, found.head.values])


def _undisturbed(model: Path, scratch: Path, settings: TrainingSettings = SETTINGS) -> tuple[Setting, list[float]]:
    found = setting(model, scratch, settings=settings)
    outcome = found.training(made_up_text(16, 1), made_up_text(6, 2), settings).complete()
    return found, [point.kl for point in outcome.curve]


def test_training_lowers_the_divergence_and_leaves_the_best_state(model: Path, tmp_path: Path) -> None:
    found, curve = _undisturbed(model, tmp_path)
    run = found.training(made_up_text(16, 1), made_up_text(6, 2), SETTINGS)
    assert len(curve) == SETTINGS.checks + 1
    assert min(curve) < 0.95 * curve[0]
    assert run.measure() == pytest.approx(min(curve), rel=1e-6)


@pytest.mark.parametrize(("kill_at", "streamed", "optimiser"), [
    ((1,), False, "muon"), ((5, 9), False, "muon"), ((5, 9), False, "adamw"), ((12,), True, "muon"),
])  # fmt: skip
def test_a_killed_run_ends_in_the_same_bits(
    model: Path, tmp_path: Path, kill_at: tuple[int, ...], streamed: bool, optimiser: OptimiserName
) -> None:
    settings = replace(SETTINGS, optimiser=optimiser)
    undisturbed = setting(model, tmp_path, streamed=streamed, settings=settings)
    text, check = made_up_text(16, 1), made_up_text(6, 2)
    whole = undisturbed.training(text, check, settings).complete()
    for limit in (*kill_at, 10**9):
        found = setting(model, tmp_path, streamed=streamed, settings=settings)

        def stop(progress: Progress, limit: int = limit) -> None:
            if progress.step >= limit:
                raise KilledError

        saves = TrainingCheckpoints(tmp_path, "run", every_s=0.0)
        try:
            outcome = found.training(text, check, settings).complete(saves, stop)
        except KilledError:
            assert limit < 10**9
    assert torch.equal(_values(found), _values(undisturbed))
    assert [point.kl for point in outcome.curve] == [point.kl for point in whole.curve]
    assert [point.loss for point in outcome.curve] == [point.loss for point in whole.curve]
    assert outcome.resumed_at == kill_at[-1] - 1


def test_a_damaged_save_is_moved_aside_and_the_one_before_it_used(model: Path, tmp_path: Path) -> None:
    undisturbed, _ = _undisturbed(model, tmp_path)
    text, check = made_up_text(16, 1), made_up_text(6, 2)

    def stop(progress: Progress) -> None:
        if progress.step == 6:
            raise KilledError

    with pytest.raises(KilledError):
        setting(model, tmp_path, settings=SETTINGS).training(text, check, SETTINGS).complete(
            TrainingCheckpoints(tmp_path, "run", every_s=0.0), stop
        )
    newest = max(tmp_path.glob("part-training-run-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    found = setting(model, tmp_path, settings=SETTINGS)
    outcome = found.training(text, check, SETTINGS).complete(TrainingCheckpoints(tmp_path, "run", every_s=0.0))
    assert outcome.resumed_at == 4
    assert len(outcome.rejected) == 1
    assert torch.equal(_values(found), _values(undisturbed))


def test_saves_say_where_the_next_run_goes_on(model: Path, tmp_path: Path) -> None:
    text, check = made_up_text(16, 1), made_up_text(6, 2)

    def stop(progress: Progress) -> None:
        if progress.step == 6:
            raise KilledError

    saves = TrainingCheckpoints(tmp_path, "run", every_s=0.0)
    assert saves.next_run == "training begins anew, as nothing of it had been saved yet"
    with pytest.raises(KilledError):
        setting(model, tmp_path, settings=SETTINGS).training(text, check, SETTINGS).complete(saves, stop)
    assert re.fullmatch(r"training goes on from step 5, saved \d+ s ago", saves.next_run)
    later = TrainingCheckpoints(tmp_path, "run")
    later.load()
    assert later.next_run == "training goes on from step 5, as this run did"


def test_divergence_stops_the_run_and_keeps_the_best(model: Path, tmp_path: Path) -> None:
    wild = replace(SETTINGS, rate=50.0, head_rate=50.0, clip=1e9, checks=12, patience=100)
    found = setting(model, tmp_path, settings=wild)
    before = _values(found).clone()
    outcome = found.training(made_up_text(16, 1), made_up_text(6, 2), wild).complete()
    assert outcome.ended == "diverged"
    assert outcome.best == 0
    assert len(outcome.curve) < wild.checks + 1
    assert torch.equal(_values(found), before)


def test_checks_without_a_gain_stop_the_run(model: Path, tmp_path: Path) -> None:
    still = replace(SETTINGS, head="fixed", checks=12, patience=3)
    found = setting(model, tmp_path, settings=still)
    found.bank.values.zero_()  # with A and B both zero nothing can move
    outcome = found.training(made_up_text(16, 1), made_up_text(6, 2), still).complete()
    assert outcome.ended == "no more gain"
    assert len(outcome.curve) == still.patience + 1


def test_a_curve_that_falls_again_is_not_given_up(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, checks=8, patience=2)
    measured = iter([1.0, 1.4, 1.3, 1.5, 1.2, 1.1, 1.3, 1.4, 0.9])  # above the first throughout, yet it falls
    monkeypatch.setattr(Training, "measure", lambda self: next(measured))
    outcome = setting(model, tmp_path, settings=settings).training(made_up_text(32, 1), made_up_text(6, 2), settings)
    found = outcome.complete()
    assert (found.ended, [point.kl for point in found.curve]) == (
        "no more gain",
        [1.0, 1.4, 1.3, 1.5, 1.2, 1.1, 1.3, 1.4],
    )


def test_a_start_is_kept_exactly_at_a_higher_rank_and_refused_at_a_lower_one(model: Path, tmp_path: Path) -> None:
    small = setting(model, tmp_path, rank=3)
    disturb(small.bank)
    start = {name: (b.clone(), a.clone()) for name, (b, a) in pairs_of(small.bank)}
    large = setting(model, tmp_path, rank=5, start=start)
    for name, (b, a) in pairs_of(large.bank):
        assert torch.equal(b @ a, start[name][0] @ start[name][1]) or torch.allclose(
            b @ a, start[name][0] @ start[name][1], atol=1e-7
        )
    with pytest.raises(UsageError, match="has rank 3"):
        setting(model, tmp_path, rank=2, start=start)


def _job(model: Path, folder: Path, devices: tuple[str, ...], resident: bool) -> TrainingJob:
    checkpoint = open_checkpoint(model)
    teacher_folder = folder.parent / "teacher"
    if not teacher_folder.is_dir():
        saved("llama", teacher_folder, seed=8, dtype=torch.float32)
    folder.mkdir()
    states = folder / "states.safetensors"
    text, check = made_up_text(16, 1), made_up_text(6, 2)
    width = 32
    generator = torch.Generator().manual_seed(0)
    write_states(states, {"key": "made up"}, 17, [torch.randn(17, 16, width, generator=generator)])
    files = [TextFile(t.ids, t.position, t.position, t.following, states) for t in (text, check)]
    start = write_part(folder, "start", {}, {})
    matrices = setting(model, folder).decoder.matrices
    ranks = {matrix.name: 4 for matrix in matrices}
    ids = np.arange(VOCABULARY)
    return TrainingJob(
        teacher=open_checkpoint(teacher_folder),
        student=checkpoint,
        teacher_ids=ids,
        student_ids=ids,
        text=files[0],
        check=files[1],
        first=0,
        ranks=ranks,
        start=start,
        settings=replace(SETTINGS, epochs=1),
        tried=True,
        placement=Placement(resident, devices, threads=1, dtype="float32", reason="", memory_bytes=0),
        folder=folder,
        key="job",
        save_seconds=120.0,
    )


def test_two_processes_give_what_one_gives(model: Path, tmp_path: Path) -> None:
    results = []
    for name, devices, resident in (("one", 1, True), ("two", 2, True), ("streamed", 2, False)):
        job = _job(model, tmp_path / name, ("cpu",) * devices, resident)
        with run_training(job, lambda progress: None) as (trainee, run):
            kl = run.outcome.curve[-1].kl
            results.append((torch.cat([trainee.bank.values, trainee.head.values]).clone(), kl))
            assert run.choice is not None
            assert len(run.choice.trials) >= 3
            assert run.settings.rate == min(run.choice.trials, key=lambda trial: trial.after).rate
    for values, kl in results[1:]:
        assert kl == pytest.approx(results[0][1], rel=1e-4)
        torch.testing.assert_close(values, results[0][0], rtol=2e-3, atol=2e-4)


def test_expected_rows_train_as_the_whole_distributions_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for rows in (True, False):
        monkeypatch.setattr("moe_svd_distill.training.job.needs_rows", lambda fixed, divergence, rows=rows: rows)
        job = _job(model, tmp_path / str(rows), ("cpu",), resident=True)
        settings = replace(job.settings, head="fixed", epochs=2, cross_entropy_share=0.2)
        with run_training(replace(job, settings=settings, tried=False), lambda progress: None) as (trainee, run):
            assert isinstance(trainee.head, FixedHead) == rows
            curves.append([(point.kl, point.loss or 0.0) for point in run.outcome.curve])
    assert len(curves[0]) == len(curves[1]) > 2
    for short, plain in zip(*curves, strict=True):
        assert short == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("resident", [True, False])
def test_training_in_bfloat16_keeps_the_factors_in_float32(model: Path, tmp_path: Path, resident: bool) -> None:
    gains = {}
    for dtype in (torch.float32, torch.bfloat16):
        job = _job(model, tmp_path / str(dtype), ("cpu",), resident)
        placement = replace(job.placement, dtype=str(dtype).removeprefix("torch."))
        job = replace(job, placement=placement, tried=False, settings=replace(job.settings, epochs=4))
        with run_training(job, lambda progress: None) as (trainee, run):
            assert trainee.bank.values.dtype == trainee.head.values.dtype == torch.float32
            assert all(matrix.value.dtype == dtype for matrix in trainee.decoder.matrices)
            curve = run.outcome.curve
            gains[dtype] = curve[0].kl - curve[run.outcome.best].kl
    assert gains[torch.float32] > 0.01
    assert gains[torch.bfloat16] == pytest.approx(gains[torch.float32], rel=0.2)


@pytest.mark.parametrize("nearly_there", [0.0, 100.0])
def test_rates_are_tried_from_a_good_start_or_with_the_untouched_student(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nearly_there: float
) -> None:
    monkeypatch.setattr("moe_svd_distill.training.job.NEARLY_THERE", nearly_there)
    job = _job(model, tmp_path / "run", ("cpu",), resident=True)
    disturbed = setting(model, tmp_path)
    disturb(disturbed.bank)
    pairs = {
        f"{name}#{side}": tensor
        for name, pair in pairs_of(disturbed.bank)
        for side, tensor in zip("BA", pair, strict=True)
    }
    change = 0.05 * torch.randn(
        VOCABULARY, disturbed.student.weight.shape[1], generator=torch.Generator().manual_seed(1)
    )
    start = write_part(job.folder, "another-start", {**pairs, "head": change}, {})
    with run_training(replace(job, tried=False), lambda progress: None) as (_, plain):
        untouched = plain.outcome.curve[0].kl
    with run_training(replace(job, start=start, key="started"), lambda progress: None) as (_, run):
        assert run.choice is not None
        begun = run.outcome.curve[0].kl
        assert abs(begun - untouched) > 1e-3
        assert run.choice.start_kl == pytest.approx(begun, rel=1e-6)
        assert run.choice.from_start == (nearly_there > 0)
        expected = begun if nearly_there else untouched
        assert all(trial.before == pytest.approx(expected, rel=1e-6) for trial in run.choice.trials)
        first = run.choice
    with run_training(replace(job, start=start, key="started"), lambda progress: None) as (_, again):
        assert again.choice == first
