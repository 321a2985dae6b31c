"""A random adapter with the size of a real one: the control that tells "this change helps" from "any change does".

A head saved whole becomes the student's own head plus Gaussian noise of the Frobenius norm of its change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from moe_svd_distill.adapter.adapter_file import read_json, sha256_of
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs, norm_of_pair
from moe_svd_distill.adapter.naming import parse_key
from moe_svd_distill.adapter.rewriting import rewrite
from moe_svd_distill.adapter.student import student_of
from moe_svd_distill.adapter.whole_head import base_head, change_norm, norm_of_blocks, row_blocks
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.checkpoints import Checkpoint, TensorInfo
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.files.names import ADAPTER_FILE, CONFIGURATION_FILE, RECORD_FILE
from moe_svd_distill.files.writing import new_folder, write_json


def write_random_control(
    adapter_folder: Path | str,
    output_folder: Path | str,
    seed: int,
    student: Checkpoint | Path | str | None = None,
) -> None:
    """Write an adapter of random pairs, each with the Frobenius norm of ``B @ A`` of the original's pair.

    A tensor's values depend on the seed and on its name alone. Norms agree up to rounding to the stored dtype.

    Args:
        adapter_folder: The original; its configuration is taken over.
        output_folder: A new or empty folder.
        seed: Seed of the random numbers.
        student: The student or its folder, for a head saved whole. Without it the base model that the configuration
            names is used, if that is a folder here.

    Raises:
        UsageError: The adapter saves a head whole and no student is at hand.
        CannotWriteError: The output exists and is not empty, or cannot be written.
        BadDataError: The original is damaged.
    """
    source = Path(adapter_folder)
    architecture = student_of(student, read_json(source / CONFIGURATION_FILE), "a random control")
    pairs = LowRankPairs(source, architecture)
    latest: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def change(info: TensorInfo) -> Iterator[torch.Tensor]:
        module, side = parse_key(info.name)
        if side == "whole":
            return _random_head(pairs, architecture, seed)
        if module not in latest:  # A and B of a pair follow each other in the file: one pair is in memory at a time
            latest.clear()
            latest[module] = _random_pair(pairs, module, seed)
        return iter((latest[module]["AB".index(side)],))

    with new_folder(Path(output_folder)) as folder:
        rewrite(pairs.header, folder / ADAPTER_FILE, change)
        write_json(folder / CONFIGURATION_FILE, pairs.configuration)
        record = {"kind": "random control", "seed": seed, "adapter_sha256": sha256_of(folder / ADAPTER_FILE)}
        write_json(folder / RECORD_FILE, record)


def _random_pair(pairs: LowRankPairs, module: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian A ``(rank, in)`` and B ``(out, rank)``; the norm is shared evenly between them."""
    right, left, experts = pairs.read_pair(module)
    generator = _generator(seed, module)
    a, b = torch.randn(right.shape, generator=generator), torch.randn(left.shape, generator=generator)
    factor = (norm_of_pair(left, right, experts) / norm_of_pair(b, a, experts)) ** 0.5
    return (a * factor).to(right.dtype), (b * factor).to(left.dtype)


def _random_head(pairs: LowRankPairs, architecture: Architecture, seed: int) -> Iterator[torch.Tensor]:
    """The student's head ``(V, d)`` plus Gaussian noise with the norm of the original's change, in blocks of rows.

    Summed in fp32 (fp64 for fp64) and rounded once to the dtype of the original's head.
    """
    new, base, name = pairs.read_head(), base_head(architecture), architecture.head

    def noise(rows: slice) -> torch.Tensor:
        """Made twice from the same seed, so that it is never in memory as a whole."""
        count = rows.stop - rows.start
        return torch.randn((count, base.shape[1]), generator=_generator(seed, f"{name} {rows.start}"))

    factor = change_norm(new, base) / norm_of_blocks(noise(rows) for rows in row_blocks(*base.shape))
    for rows in row_blocks(*base.shape):
        wide = base[rows].double() if torch.float64 in (base.dtype, new.dtype) else base[rows].float()
        block = (wide if factor == 0.0 else wide + factor * noise(rows).to(wide.dtype)).to(new.dtype)
        if not bool(torch.isfinite(block).all()):
            raise BadDataError(f"{name}: values that are not finite in {new.dtype}", "Use a smaller factor")
        yield block


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
