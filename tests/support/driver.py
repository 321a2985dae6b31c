"""A whole run as a program of its own, to be killed by the tests: ``python -m tests.support.driver OUT …``.

Prints a line per event that the tests wait for, and at last the digest of the adapter.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_svd_distill.errors import DistillError
from moe_svd_distill.execution.events import Event, UnitStarted, WorkerStarted
from moe_svd_distill.execution.publish import OutputFolder
from moe_svd_distill.execution.supervisor import ExecutionSettings, execute
from moe_svd_distill.files.writing import write_json
from tests.support.workload import ToyWork, consolidated, toy_units


def show(event: Event) -> None:
    match event:
        case WorkerStarted(pid=pid):
            print("worker", pid, flush=True)
        case UnitStarted(label=label):
            print("unit", label, flush=True)
        case _:
            pass


def run(out: Path, units: int, workers: int, seconds: float) -> str:
    """Execute, consolidate and publish; returns the digest of the adapter."""
    journal = out.parent / f"{out.name}.journal"
    with OutputFolder(out) as folder:
        work = ToyWork(journal, seconds)
        summary = execute(toy_units(units), work, folder.parts, ExecutionSettings(workers), show)
        digest = consolidated(list(summary.parts.values()), folder.staged("adapter_model.safetensors"))
        write_json(folder.staged("adapter_config.json"), {"r": 8})
        write_json(folder.staged("run.json"), {"sha256": digest})
        folder.publish()
    return digest


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--units", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0)
    options = parser.parse_args()
    try:
        print("sha256", run(options.out, options.units, options.workers, options.seconds), flush=True)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        return int(getattr(error, "exit_code", 130))
    return 0


if __name__ == "__main__":
    sys.exit(main())
