"""k-means of expert fingerprints from their Gram matrix against scikit-learn on the raw fingerprints.

``python -m benchmarks.kmeans``. Both sides: k-means++ with the same seed and the same number of restarts, so the same
initial centres; our time includes the Gram matrix.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from benchmarks._measure import cpu_time, one_thread, print_machine, write_json
from moe_svd_distill.algebra.clustering import Clustering, gram_of_rows, kmeans_from_gram

EXPERTS, CLUSTERS, LENGTH, SEED = 128, 64, 470_000, 42
GOAL = 90


@dataclass(frozen=True)
class Row:
    """One set of fingerprints."""

    fingerprints: str
    experts: int
    length: int
    clusters: int
    restarts: int
    raw_seconds: float
    gram_seconds: float
    ratio: float
    same_labels: float  # share of the experts
    inertia: float  # ours / scikit-learn's


def fingerprints(kind: str, generator: torch.Generator) -> Tensor:
    """ "clustered": one of 64 common parts in each, half of its energy; "unrelated": nothing in common."""
    rows = torch.randn(EXPERTS, LENGTH, generator=generator) * 0.02
    if kind == "clustered":
        parts = torch.randn(CLUSTERS, LENGTH, generator=generator) * 0.02
        rows += parts[torch.randint(CLUSTERS, (EXPERTS,), generator=generator)]
    return rows


def measure(kind: str, restarts: int) -> Row:
    """Both ways on the same fingerprints."""
    rows = fingerprints(kind, torch.Generator().manual_seed(0))
    raw = rows.numpy()
    start = time.process_time()
    reference = KMeans(CLUSTERS, n_init=restarts, random_state=SEED).fit(raw)
    raw_seconds = time.process_time() - start

    def ours() -> Clustering:
        return kmeans_from_gram(gram_of_rows([rows]), CLUSTERS, SEED, restarts)

    ours()
    gram_seconds = cpu_time(ours, 3).median
    result = ours()
    return Row(
        fingerprints=kind,
        experts=EXPERTS,
        length=LENGTH,
        clusters=CLUSTERS,
        restarts=restarts,
        raw_seconds=raw_seconds,
        gram_seconds=gram_seconds,
        ratio=raw_seconds / gram_seconds,
        same_labels=float((torch.from_numpy(reference.labels_) == result.labels).float().mean()),
        inertia=result.inertia / float(reference.inertia_),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--restarts", type=int, default=3)
    arguments = parser.parse_args()
    one_thread()
    print_machine()
    print(f"{EXPERTS} experts of {LENGTH} weights, {CLUSTERS} clusters, {arguments.restarts} restarts; goal {GOAL}x")
    print("fingerprints  raw s   Gram s   ratio  same labels  inertia")
    rows = []
    for kind in ("clustered", "unrelated"):
        row = measure(kind, arguments.restarts)
        rows.append(row)
        print(
            f"{row.fingerprints:12}  {row.raw_seconds:5.1f}  {row.gram_seconds:7.3f}  {row.ratio:5.0f}x"
            f"  {row.same_labels:11.1%}  {row.inertia:7.5f}",
            flush=True,
        )
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
