"""``python -m benchmarks``: every measurement behind docs/benchmarks.md, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

MEASUREMENTS = ("truncated_svd", "kmeans", "whole_run", "lab_pairs")


def main() -> None:
    """Run all of them; a failure stops."""
    for name in sys.argv[1:] or MEASUREMENTS:
        print(f"\n== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
