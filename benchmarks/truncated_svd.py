"""Truncated SVD of difference matrices against ``torch.linalg.svd``, side by side.

``python -m benchmarks.truncated_svd``. Spectra: ``bulk`` = Gaussian entries of 0.02 plus a part of rank N/4 with
singular values ``s_1 i^-0.5``, s_1 five times the largest of the Gaussian part; ``pow0.5`` = ``i^-0.5``. N is the
smaller size.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._measure import cpu_time, one_thread, print_machine, write_json
from moe_svd_distill.algebra.low_rank import truncated_svd

RANKS = (16, 64, 128, 256)
GOALS = {(768, 2048): (35, 14, 7, 5), (2048, 2048): (60, 35, 25, 8)}
REPETITIONS = 7


@dataclass(frozen=True)
class Row:
    """One rank of one matrix."""

    spectrum: str
    shape: tuple[int, int]
    rank: int
    milliseconds: float
    ratio: float  # CPU time of torch.linalg.svd / ours, medians
    goal: int
    residual: float  # ours / Eckart-Young optimum
    energy: float  # ours / best possible at this rank


def bulk(m: int, n: int, generator: torch.Generator, *, strength: float = 5.0) -> Tensor:
    """Gaussian entries of 0.02 plus a power-law part of rank N/4 that sticks out ``strength`` times."""
    deviation, part = 0.02, min(m, n) // 4
    edge = deviation * (m**0.5 + n**0.5)
    values = strength * edge * torch.arange(1, part + 1).float() ** -0.5
    return torch.randn(m, n, generator=generator) * deviation + _with_values(m, n, values, generator)


def power_law(m: int, n: int, exponent: float, generator: torch.Generator) -> Tensor:
    """Singular values ``i^-exponent`` and random singular vectors."""
    return _with_values(m, n, torch.arange(1, min(m, n) + 1).float() ** -exponent, generator)


def _with_values(m: int, n: int, values: Tensor, generator: torch.Generator) -> Tensor:
    left = torch.linalg.qr(torch.randn(m, len(values), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(n, len(values), generator=generator))[0]
    return (left * values) @ right.T


def measure(spectrum: str, matrix: Tensor, goals: tuple[int, ...], repetitions: int) -> list[Row]:
    """All ranks of one matrix, each next to the reference in time."""
    generator = torch.Generator().manual_seed(1)
    squares = torch.linalg.svdvals(matrix.double()).square()
    total = float(squares.sum())
    rows = []
    for rank, goal in zip(RANKS, goals, strict=True):
        full = cpu_time(lambda: torch.linalg.svd(matrix, full_matrices=False), 1)
        ours = cpu_time(partial(truncated_svd, matrix, rank, generator=generator), repetitions)
        result = truncated_svd(matrix, rank, generator=generator)
        product = result.left.double() @ result.right.double()
        missed = float((matrix.double() - product).square().sum())
        best = float(squares[:rank].sum())
        rows.append(
            Row(
                spectrum=spectrum,
                shape=(matrix.shape[0], matrix.shape[1]),
                rank=rank,
                milliseconds=ours.median * 1e3,
                ratio=full.median / ours.median,
                goal=goal,
                residual=(missed / (total - best)) ** 0.5,
                energy=(total - missed) / best,
            )
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    arguments = parser.parse_args()
    one_thread()
    print_machine()
    print("spectrum   shape       rank      ms   ratio  (goal)  residual/optimum  energy/optimum")
    rows: list[Row] = []
    generator = torch.Generator().manual_seed(0)
    for (m, n), goals in GOALS.items():
        for spectrum, matrix in (("bulk", bulk(m, n, generator)), ("pow0.5", power_law(m, n, 0.5, generator))):
            for row in measure(spectrum, matrix, goals, arguments.repetitions):
                rows.append(row)
                print(
                    f"{row.spectrum:9}  {m:4} x {n:4}  {row.rank:5}  {row.milliseconds:6.1f}  {row.ratio:5.1f}x"
                    f"  ({row.goal:3}x)  {row.residual:16.5f}  {row.energy:14.4f}",
                    flush=True,
                )
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
