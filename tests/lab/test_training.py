"""Reproducible training, and cropping, on models that take a second."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lab.architectures import fresh_model
from lab.cropping import crop_into
from lab.plan import CONTEXT, Schedule
from lab.training import Snapshot, batches, cosine_rate, falling_rate, train

TOKENS = np.random.default_rng(0).integers(0, 2048, 40 * CONTEXT).astype(np.uint16)
SHORT = Schedule(tokens=2 * CONTEXT, batch=1)


def silent(line: str) -> None:
    pass


def test_schedule_warms_up_and_falls_to_its_floor():
    schedule = Schedule(tokens=1000 * 8 * CONTEXT)
    rates = [cosine_rate(schedule, step) for step in range(schedule.steps)]
    assert max(rates) == pytest.approx(schedule.peak_rate)
    assert rates[0] < rates[39]
    assert rates[-1] == pytest.approx(schedule.floor * schedule.peak_rate, rel=0.01)
    assert falling_rate(1.0, schedule, schedule.steps - 1) == pytest.approx(schedule.floor)


def test_batches_depend_on_the_seed_only():
    first, again, other = (next(batches(TOKENS, 4, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_branch_goes_on_with_the_next_batch_and_learns(tmp_path):
    def trunk():
        model = fresh_model("llama-small", seed=3)
        train(model, TOKENS, SHORT, snapshots={1: tmp_path / "half.pt"}, report=silent)
        return model

    first, second = trunk().state_dict(), trunk().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    state = Snapshot.load(tmp_path / "half.pt")
    assert state.step == 1
    model = fresh_model("llama-small", seed=3)
    train(model, TOKENS, replace(SHORT, tokens=0), branch=state, report=silent)
    assert all(torch.equal(value, state.weights[name]) for name, value in model.state_dict().items())
    train(model, TOKENS, replace(SHORT, tokens=CONTEXT), branch=state, report=silent)
    assert any(not torch.equal(value, state.weights[name]) for name, value in model.state_dict().items())


def test_cropping_takes_everything_from_the_teacher():
    teacher = fresh_model("qwen3-moe-large", seed=4)
    student = fresh_model("qwen3-moe-small", seed=5)
    untouched = {name: value.clone() for name, value in student.state_dict().items()}
    crop_into(student, teacher)
    columns = set(map(tuple, teacher.state_dict()["model.embed_tokens.weight"].T.tolist()))
    kept = student.state_dict()["model.embed_tokens.weight"].T.tolist()
    assert set(map(tuple, kept)) <= columns
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, untouched[name])]
    assert {name for name in untouched if untouched[name].dim() > 1} == set(changed)
