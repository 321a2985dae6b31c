"""Many runs killed in one program that imports torch once: ``python -m tests.support.storm FOLDER TRIALS STRIDE``.

Two kinds of trial, each in a fork of its own, with worker processes forked as well:

- kills: the whole process group of a run dies at a random moment, again and again, until one run gets through;
- crashes: the process dies before, or fails at, the k-th operation on files, for every k of a stride.

The test suite takes 5 trials and a stride of 3; 100 and 1 are for an afternoon on which this room was changed. Prints
what was seen as JSON, for the tests to judge.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_svd_distill.errors import CannotWriteError
from moe_svd_distill.execution import processes
from moe_svd_distill.execution.parts import part_path, verify_part, write_part
from moe_svd_distill.execution.publish import OutputFolder
from moe_svd_distill.files.writing import write_json
from tests.support.driver import run
from tests.support.workload import consolidated

_OPERATIONS = {
    "die": ("open", "write", "fchmod", "fsync", "close", "replace", "unlink", "mkdir"),
    "fail": ("open", "write", "fsync", "replace"),
}
_CRASHED = 9
_EXPLAINED = 73


def forked(work: Callable[[], None], *, kill_after: float | None = None) -> int:
    """Run ``work`` in a fork with a process group of its own; returns its exit code, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
            work()
            code = 0
        except CannotWriteError:
            code = _EXPLAINED
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_runs(folder: Path, trial: int, units: int, workers: int) -> dict[str, Any]:
    """Kill runs over one output folder until one of them gets through."""
    out = folder / f"killed-{trial}"
    kills = 0
    chance = random.Random(trial)
    while forked(lambda: run(out, units, workers, 0.02), kill_after=chance.uniform(0.02, 0.25)) != 0:
        kills += 1
        if kills == 4:
            assert forked(lambda: run(out, units, workers, 0.02)) == 0
            break
    begun = (folder / f"{out.name}.journal").read_text().splitlines()
    time.sleep(0.05)  # the last of the killed may have been dying still when their leftovers were looked at
    with OutputFolder(out):
        pass
    leftovers = [path.name for path in out.rglob("*") if ".tmp~" in path.name or "rejected" in path.name]
    digest = json.loads((out / "run.json").read_text())["sha256"]
    return {"kills": kills, "digest": digest, "begun": len(begun), "workers": workers, "leftovers": leftovers}


def small_run(out: Path) -> None:
    """All that a run does with files, in one process."""
    with OutputFolder(out) as folder:
        for number in range(2):
            key = f"{number:064x}"
            if not verify_part(part_path(folder.parts, key), key):
                write_part(folder.parts, key, {f"layers.{number}": torch.full((64,), number + 0.5)}, {})
        parts = [part_path(folder.parts, f"{number:064x}") for number in range(2)]
        digest = consolidated(parts, folder.staged("adapter_model.safetensors"))
        write_json(folder.staged("adapter_config.json"), {"r": 8})
        write_json(folder.staged("run.json"), {"sha256": digest})
        folder.publish()


def trip_at(number: int, how: str) -> None:
    """Make the ``number``-th operation on files the last one: the process dies before it, or it finds the disk full.

    A full disk shows itself where something is written: opening a file to read it counts for a death only.
    """
    left = number

    def tripping(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if how == "fail" and original is real_open and not args[1] & os.O_CREAT:
                return original(*args, **kwargs)
            left -= 1
            if left == 0 and how == "die":
                os._exit(_CRASHED)
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return operation

    real_open = os.open
    for name in _OPERATIONS[how]:
        setattr(os, name, tripping(getattr(os, name)))


def crash(folder: Path, number: int, how: str, over_old: bool) -> dict[str, Any]:
    """Crash at one operation, look at what is there, and run again."""
    out = folder / f"{how}-{number}-{over_old}"
    if over_old:
        forked(lambda: small_run(out))

    def doomed() -> None:
        trip_at(number, how)
        small_run(out)

    code = forked(doomed)
    manifest, model = out / "run.json", out / "adapter_model.safetensors"
    torn = manifest.exists() and not is_whole(manifest, model)
    temporaries = len(list(out.rglob(".tmp~*"))) if out.exists() else 0
    again = forked(lambda: small_run(out))
    return {
        "code": code,
        "torn": torn,
        "temporaries": temporaries,
        "again": again,
        "whole": is_whole(manifest, model),
        "left": len(list(out.rglob(".tmp~*"))),
    }


def is_whole(manifest: Path, model: Path) -> bool:
    import hashlib

    try:
        return bool(json.loads(manifest.read_text())["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest())
    except (OSError, ValueError):
        return False


def crash_everywhere(folder: Path, how: str, over_old: bool, stride: int) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    number = 1 + over_old
    while not seen or seen[-1]["code"] != 0:
        seen.append(crash(folder, number, how, over_old))
        number += stride
    return seen


def main() -> None:
    folder = Path(sys.argv[1])
    trials, stride = map(int, sys.argv[2:])
    processes.START_METHOD = "fork"
    torch.set_num_threads(1)
    kills = [killed_runs(folder, trial, 6, trial % 3 + 1) for trial in range(trials)]
    crashes = {
        f"{how} {'over old' if over_old else 'fresh'}": crash_everywhere(folder, how, over_old, step)
        for how, step in (
            ("die", stride),
            ("fail", max(1, stride - 1)),
        )  # fewer operations can fail than can be the last
        for over_old in (False, True)
    }
    print(json.dumps({"kills": kills, "crashes": crashes}))


if __name__ == "__main__":
    main()
