"""Programs that a model wrote, run under limits.

Each runs in a process of its own, in an empty folder of its own, isolated (`python -I`) and with an empty environment;
time, memory and the size of files are limited. Where the kernel allows it, it has no network and sees no other process
(Linux namespaces), and can change no file outside its folder (Landlock). It can read what its user can read. `Guards`
says what held; none of this replaces a container for models that are not trusted.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.evaluation.code import sandbox_child

_UNSHARE = ("--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # numpy needs no thread then
_STDERR, _PROGRAM = ".stderr", ".program"
_REASON = 100
_NEARLY = 0.9  # the kernel ends a program a little before the whole of its seconds


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_seconds: Of processor time.
        wall_seconds: Of time.
        memory_bytes: Of address space.
        file_bytes: Of each file it writes.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory_bytes: int = 2 << 30
    file_bytes: int = 16 << 20


@dataclass(frozen=True)
class Guards:
    """What this machine allows beyond limits.

    Attributes:
        network: Whether programs are cut off from it, and from other processes.
        files: Whether they can change files in their own folder only.
    """

    network: bool
    files: bool

    def __str__(self) -> str:
        network = "no network" if self.network else "the network within reach (no user namespaces here)"
        files = "changes to their own folder only" if self.files else "whatever their user may change (no Landlock)"
        return f"{network}; {files}"


def guards() -> Guards:
    """Try out what this machine allows."""
    network = False
    if unshare := shutil.which("unshare"):
        done = subprocess.run([unshare, *_UNSHARE, "true"], capture_output=True, timeout=30, check=False)
        network = done.returncode == 0
    return Guards(network, sys.platform == "linux" and sandbox_child.landlock_version() > 0)


def run_program(source: str, limits: Limits, allowed: Guards) -> str | None:
    """Run one program to its end or its limits.

    Args:
        source: Python.
        limits: What it may use.
        allowed: As `guards` found.

    Returns:
        None if it came to its end; otherwise the name of its exception, or `timed out`.

    Raises:
        BadDataError: The limits could not be set; the program was not run.
    """
    with tempfile.TemporaryDirectory(prefix="program-") as scratch:
        folder = Path(scratch) / "folder"
        folder.mkdir()
        program, said = Path(scratch) / _PROGRAM, Path(scratch) / _STDERR
        program.write_text(source, encoding="utf-8")
        values = (limits.memory_bytes, limits.cpu_seconds, limits.file_bytes)
        command = [sys.executable, "-I", "-X", "utf8", sandbox_child.__file__, str(program), *map(str, values)]
        if allowed.network:
            command = [str(shutil.which("unshare")), *_UNSHARE, *command]
        used = _cpu_seconds()
        with said.open("wb") as stderr:
            code = _run(command, folder, stderr.fileno(), limits.wall_seconds)
        used = _cpu_seconds() - used
        reason = said.read_text(encoding="utf-8", errors="replace")[:_REASON]
    if code == sandbox_child.UNPROTECTED:
        raise BadDataError(f"generated code cannot be limited here ({reason})", "Leave this benchmark out")
    if code == sandbox_child.PASSED:
        return None
    # What ended it is told by the time it took: unshare does not hand on the signal.
    if code is None or used >= _NEARLY * limits.cpu_seconds:
        return "timed out"
    return reason or f"exit code {code}"


def _run(command: list[str], folder: Path, stderr: int, seconds: float) -> int | None:
    """The exit code; None after the wall-clock limit."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**_ENVIRONMENT, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also after its end, for what it may have left behind in its group.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _cpu_seconds() -> float:
    """Of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
