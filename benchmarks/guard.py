"""How often the guard keeps what it should not, and loses what it should keep: simulated on measured documents.

    python benchmarks/guard.py --runs 2000

Adapters that were fitted to two of the lab's pairs on very little text were measured on 205 documents in blocks of 64
tokens (`guard_data.py`; `results/guard-blocks.safetensors`). Here documents are drawn from these, with lengths of their
own, their blocks anew, and the mean moved so that the best scale truly closes a given share of KL. What differs between
documents stays as it was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs by its path as well

from benchmarks._measure import print_machine, write_json
from moe_svd_distill.algebra.figures import Measurement
from moe_svd_distill.evaluation.scale_search import search_scale

BLOCKS = Path(__file__).parent / "results" / "guard-blocks.safetensors"
BLOCK_TOKENS = 64
TOKENS_OF_A_DOCUMENT = 340  # 4,096 tokens over 12 documents, 16,384 over 48
DOCUMENTS = (8, 12, 20, 50)
LENGTHS = ("even", "heavy", "half")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """What an adapter truly does.

    Attributes:
        kl: Share of KL that it closes at its best scale; below 0, what it adds at scale 1.
        cross_entropy: Fall of cross-entropy as a multiple of the fall of KL, in nats.
        flat: Whether every scale does the same, which at 0 is the hardest useless adapter to refuse.
        spread: Factor on what was measured to differ between documents.
    """

    kl: float
    cross_entropy: float = 1.0
    flat: bool = False
    spread: float = 1.0


TRUTHS = (
    Truth(-0.05),
    Truth(0.0),
    Truth(0.0, flat=True),
    Truth(0.02),
    Truth(0.05),
    Truth(0.10),
    Truth(0.05, spread=1.5),
    Truth(0.05, cross_entropy=-0.5),
)


@dataclass(frozen=True)
class Row:
    """What the guard said about adapters of one kind on texts of one kind, as shares of the runs."""

    truth: Truth
    lengths: str
    documents: int
    runs: int
    kept: float
    unproven: float
    none: float
    harm: float


def pools(path: Path = BLOCKS) -> dict[str, list[Array]]:
    """Adapter to documents, each (blocks, 5): KL untouched; fall of KL, then of cross-entropy, as a·s − c·s²: a, c.

    All in nats per token.
    """
    stored = load_file(path)
    first = stored.pop("first_block").astype(np.int64)
    return {name: np.split(values.astype(np.float64), first[1:]) for name, values in sorted(stored.items())}


def moved(documents: list[Array], truth: Truth) -> list[Array]:
    """The documents of an adapter whose true effect is another."""
    means = np.mean([blocks.mean(axis=0) for blocks in documents], axis=0)
    kl, bend = means[0], 0.0 if truth.flat else max(means[2] / means[0], 0.0)
    if truth.kl <= 0:
        slope, bend = 0.0, max(bend if truth.kl == 0 else 0.0, -truth.kl)
    elif bend > truth.kl:  # the best scale is below 1
        slope = 2 * np.sqrt(bend * truth.kl)
    else:
        slope = truth.kl + bend
    falls = np.array([slope, bend, truth.cross_entropy * slope, abs(truth.cross_entropy) * bend]) * kl
    wanted = np.concatenate([[kl], falls])
    stretch = np.array([1.0, *[truth.spread] * 4])
    return [wanted + (blocks - means) * stretch for blocks in documents]


def lengths(kind: str, documents: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Blocks of each document: all alike, log-normal, or one of them half of all."""
    total = documents * TOKENS_OF_A_DOCUMENT / BLOCK_TOKENS
    drawn = np.ones(documents) if kind == "even" else np.exp(1.2 * rng.standard_normal(documents))
    if kind == "half":
        drawn[0] = drawn[1:].sum()
    return np.maximum(np.rint(drawn / drawn.sum() * total), 1).astype(np.int64)


def text(documents: list[Array], blocks: NDArray[np.int64], rng: np.random.Generator) -> Callable[..., Measurement]:
    """A search text: measures the student at scales, as `search_scale` asks for it."""
    chosen = [documents[number] for number in rng.integers(len(documents), size=len(blocks))]
    drawn = [own[rng.integers(len(own), size=count)].mean(axis=0) for own, count in zip(chosen, blocks, strict=True)]
    kl, a, c, entropy_a, entropy_c = np.array(drawn).T
    tokens = blocks * float(BLOCK_TOKENS)

    def at(scales: Mapping[str, float]) -> Measurement:
        (scale,) = scales.values()
        fall, entropy_fall = a * scale - c * scale**2, entropy_a * scale - entropy_c * scale**2
        return Measurement(tokens * (kl - fall), tokens * (4.0 - entropy_fall), 0.5 * tokens, tokens)

    return at


def simulate(truth: Truth, kind: str, documents: int, runs: int, seed: int = 0) -> Row:
    """Let the guard judge `runs` texts, the adapters in turn."""
    rng = np.random.default_rng([seed, documents, LENGTHS.index(kind)])
    adapters = [moved(own, truth) for own in pools().values()]
    said = Counter(
        search_scale(text(adapters[run % len(adapters)], lengths(kind, documents, rng), rng), ("all",)).kind
        for run in range(runs)
    )
    shares = {name: said[name] / runs for name in ("kept", "unproven", "none", "harm")}  # type: ignore[index]
    return Row(truth, kind, documents, runs, **shares)


def table(rows: list[Row]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| truly closes | lengths | documents | kept | not proven | no effect | harm |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        truth = row.truth
        name = f"{truth.kl:+.0%}" + (" at every scale" if truth.flat else "")
        name += f", spread × {truth.spread:g}" if truth.spread != 1 else ""
        name += ", cross-entropy rises" if truth.cross_entropy < 0 else ""
        shares = " | ".join(f"{share:.2%}" for share in (row.kept, row.unproven, row.none, row.harm))
        yield f"| {name} | {row.lengths} | {row.documents} | {shares} |"


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--runs", type=int, default=2000)
    options.add_argument("--json", type=Path)
    asked = options.parse_args()
    print_machine()
    rows = [
        simulate(truth, kind, documents, asked.runs) for truth in TRUTHS for kind in LENGTHS for documents in DOCUMENTS
    ]
    print("\n".join(table(rows)))
    if asked.json:
        write_json(asked.json, rows)


if __name__ == "__main__":
    main()
