"""A stand-in for wandb: copied as `wandb.py` to where it is imported from, it writes down what it is told, and by whom.

`WANDB_STAND_IN` names the file. `WANDB_MODE` and the way it fails (`WANDB_FAILS`: init, or log) are as of the real one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def _write_down(what: str, **values: Any) -> None:
    with Path(os.environ["WANDB_STAND_IN"]).open("a") as file:
        file.write(json.dumps({"what": what, "process": os.getpid(), **values}) + "\n")


class Settings:
    def __init__(self, **values: Any) -> None:
        self.values = values


class _Summary:
    def update(self, figures: dict[str, float]) -> None:
        _write_down("summary", figures=figures)


class _Run:
    def __init__(self, dir: str) -> None:
        self.dir, self.summary = f"{dir}/wandb/offline-run/files", _Summary()

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        _write_down("metric", name=name, step_metric=step_metric)

    def log(self, figures: dict[str, float]) -> None:
        if os.environ.get("WANDB_FAILS") == "log":
            raise ConnectionError(f"no way, says {os.environ['WANDB_API_KEY']}")
        _write_down("log", figures=figures)

    def finish(self, exit_code: int) -> None:
        _write_down("finish", exit_code=exit_code)


def setup(settings: Settings) -> None:
    _write_down("setup", settings=settings.values)


def teardown() -> None:
    _write_down("teardown")


def init(*, mode: str | None = None, settings: Settings, **values: Any) -> _Run:
    if os.environ.get("WANDB_FAILS") == "init" and mode != "offline":
        raise ConnectionError(f"no way, says {os.environ['WANDB_API_KEY']} to {'0123456789abcdef' * 3}")
    _write_down("init", mode=mode, asks=sys.stdin.isatty(), settings=settings.values, **values)
    return _Run(values["dir"])
