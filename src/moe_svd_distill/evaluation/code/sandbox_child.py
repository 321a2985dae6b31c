"""Run in a process of its own, by its path and isolated: set the limits, then run one program.

    python -I sandbox_child.py PROGRAM MEMORY_BYTES CPU_SECONDS FILE_BYTES

It imports nothing of this project. Its exit code is `PASSED` if and only if the program came to its end: a program that
leaves by itself, with whatever code, has not.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from pathlib import Path

PASSED = 87
UNPROTECTED = 88  # the program was not run

_NO_NEW_PRIVILEGES = 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_BENEATH = 1
_WRITE_FILE = 1 << 1
_CHANGES = _WRITE_FILE | sum(1 << bit for bit in (4, 5, 6, 7, 8, 9, 10, 11, 12))  # remove and make, of every kind
_REFER, _TRUNCATE = 1 << 13, 1 << 14


def landlock_version() -> int:
    """The kernel's version of Landlock; 0 where it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(ctypes.CDLL(None, use_errno=True).syscall(_CREATE_RULESET, None, 0, 1)))


def write_only_in(folder: str) -> None:
    """Take from this process, for good, the right to change files outside a folder (Linux, Landlock).

    Raises:
        OSError: The kernel refuses.
    """
    call, version = ctypes.CDLL(None, use_errno=True).syscall, landlock_version()
    rights = _CHANGES | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("=Q", rights)
    ruleset = _checked(call(_CREATE_RULESET, attributes, len(attributes), 0))
    for path, allowed in ((folder, rights), (os.devnull, _WRITE_FILE)):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _checked(call(_ADD_RULE, ruleset, _BENEATH, struct.pack("=Qi", allowed, descriptor), 0))
        os.close(descriptor)
    _checked(ctypes.CDLL(None, use_errno=True).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _checked(call(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _limit(memory: int, cpu: int, file: int) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),  # neither processes nor threads; root alone is not held to it
    ):
        resource.setrlimit(kind, (value, value))


def main() -> None:
    """Set the limits and run the program, which says nothing; on standard error comes why it ended."""
    said = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    program, memory, cpu, file = sys.argv[1], *map(int, sys.argv[2:5])
    source = Path(program).read_text(encoding="utf-8")
    try:
        if landlock_version():
            write_only_in(str(Path.cwd()))
        _limit(memory, cpu, file)
    except Exception as error:  # whatever it is, the program must not be run
        os.write(said, str(error).encode())
        os._exit(UNPROTECTED)
    sys.argv = ["program"]
    try:
        exec(compile(source, "program", "exec"), {"__name__": "program"})
    except BaseException as error:  # SystemExit among them: the tests after it have not been run
        os.write(said, type(error).__name__.encode())
        os._exit(1)
    os._exit(PASSED)


if __name__ == "__main__":
    main()
