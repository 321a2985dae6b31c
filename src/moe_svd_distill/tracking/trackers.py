"""One class for each tracker: figures go in, and its own library, imported where it is asked for, does the rest."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_svd_distill.errors import reason_of

PROJECT = "moe-svd-distill"
TENSORBOARD_FOLDER = "runs"
OFFLINE = ("offline", "dryrun", "disabled")
REACH_S = 30.0
"""How long W&B may take to answer, at the beginning and at the end."""
_KEY = re.compile(r"\b[0-9a-f]{40,}\b|\bwandb_v\d+_\w+|(?<=Bearer )\S+|(?<=://)[^/@\s]+(?=@)")


@dataclass(frozen=True)
class RunPlace:
    """What a tracker needs to know of a run.

    Attributes:
        identity: The same whenever the run goes on.
        folder: Of the adapter.
        configuration: What was asked for; empty where that is not known.
        note: Told what people should know.
    """

    identity: str
    folder: Path
    configuration: Mapping[str, object]
    note: Callable[[str], None]


class Tracker(Protocol):
    """Takes figures of a part of the run, such as ``refined``; without a step they stand at its end."""

    def write(self, part: str, figures: Mapping[str, float], step: int | None) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in ``runs`` in the adapter's folder; each process adds one, and TensorBoard reads them as one run."""

    def __init__(self, place: RunPlace) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter
        self._writer = writer(log_dir=str(place.folder / TENSORBOARD_FOLDER / place.identity))
        if place.configuration:
            rows = [f"| {key} | {value} |" for key, value in place.configuration.items()]
            self._writer.add_text("recipe", "\n".join(("| key | value |", "| --- | --- |", *rows)), 0)

    def write(self, part: str, figures: Mapping[str, float], step: int | None) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(_tag(part, name), value, step or 0)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; where it cannot be reached, its files are kept for ``wandb sync``."""

    def __init__(self, place: RunPlace) -> None:
        import wandb

        self._wandb: Any = wandb
        self._parts: set[str] = set()
        with _nobody_asked():
            try:
                self._run = self._begin(place)
            except Exception as error:
                if os.environ.get("WANDB_MODE", "") in OFFLINE:
                    raise
                wandb.teardown()  # the run's name would be in use
                self._run = self._begin(place, mode="offline")
                folder = Path(self._run.dir).parent
                why = reason_without_key(error)
                place.note(f"W&B is not reached ({why}); its files are kept, to be sent with: wandb sync {folder}")

    def write(self, part: str, figures: Mapping[str, float], step: int | None) -> None:
        named = {_tag(part, name): value for name, value in figures.items()}
        if step is None:
            self._run.summary.update(named)
            return
        at = _tag(part, "step")
        if part not in self._parts:
            self._parts.add(part)
            self._run.define_metric(at)
            self._run.define_metric(_tag(part, "*"), step_metric=at)
        self._run.log({**named, at: step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _begin(self, place: RunPlace, **mode: str) -> Any:
        waiting = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": REACH_S}
        settings = self._wandb.Settings(silent=True, console="off", finish_timeout=REACH_S, **waiting)
        self._wandb.setup(self._wandb.Settings(silent=True))  # or it says where the key is from
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=place.identity,
            name=os.environ.get("WANDB_NAME", place.folder.name),
            resume="allow",
            config=dict(place.configuration) or None,
            dir=os.environ.get("WANDB_DIR", str(place.folder)),
            settings=settings,
            **mode,
        )


TRACKERS: Mapping[str, Callable[[RunPlace], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def _tag(part: str, name: str) -> str:
    """Without the letters that TensorBoard would replace, so that a figure has one name everywhere."""
    return "/".join("_".join(re.findall(r"[\w.*-]+", word)) for word in (part, name))


def reason_without_key(error: Exception) -> str:
    """Why, without anything that looks like a key."""
    key, reason = os.environ.get("WANDB_API_KEY"), reason_of(error)
    return _KEY.sub("***", reason.replace(key, "***") if key else reason)


@contextmanager
def _nobody_asked() -> Iterator[None]:
    """W&B asks for a key on a terminal, where the bars are."""
    before = sys.stdin
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before
