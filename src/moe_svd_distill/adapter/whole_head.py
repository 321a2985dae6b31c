"""A head that an adapter saves whole, next to the student's own: what they differ by, and the points between them.

A LoRA pair is a change and needs nothing else. A head saved whole is the new weight ``W'``; its change ``W' - W``
exists only beside the student's ``W``. So whatever scales, compares or replaces the change asks for the student here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.adapter.blocks import row_blocks
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.architecture.skeleton import HEAD
from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint
from moe_svd_distill.errors import BadDataError, UsageError
from moe_svd_distill.files.dtypes import FLOATS

if TYPE_CHECKING:
    import torch


def student_of(student: Checkpoint | Path | str | None, configuration: Mapping[str, Any], purpose: str) -> Architecture:
    """The student an adapter is for: the one given, else the base model of its configuration if that lies here.

    Args:
        student: What the caller was given.
        configuration: The content of adapter_config.json.
        purpose: What the student is needed for, in the words of an error.

    Raises:
        UsageError: There is none at hand.
    """
    if isinstance(student, Checkpoint):
        return Architecture(student)
    named = configuration.get("base_model_name_or_path")
    if student is None and isinstance(named, str) and named and (Path(named) / "config.json").is_file():
        student = named
    if student is None:
        raise UsageError(f"{purpose} needs the student, and none is at hand", "Give the student")
    return Architecture(open_checkpoint(student))


def base_name(architecture: Architecture) -> str:
    """The tensor that holds the student's own head: the embeddings where the two are tied.

    Raises:
        BadDataError: The student is tied in config.json and has another head in its files.
    """
    if not architecture.tied:
        return architecture.head
    import torch

    checkpoint, embedding = architecture.checkpoint, architecture.embedding
    for source in architecture.stored.of_part[HEAD]:
        for _, name in source.hub_names:
            if name != embedding and not torch.equal(checkpoint.read(name), checkpoint.read(embedding)):
                raise BadDataError(
                    f"{checkpoint.source} ties its head to its embeddings in config.json, but {name} and {embedding} "
                    "differ in its files: loaders disagree on which counts",
                    "Set tie_word_embeddings to what is meant, or remove the tensor that is not used",
                )
    return embedding


def base_head(architecture: Architecture) -> torch.Tensor:
    """The student's own head ``(V, d)`` as stored; the rest of the student may be quantised.

    Raises:
        BadDataError: It is not stored as floating-point numbers.
    """
    info = architecture.checkpoint[base_name(architecture)]
    if info.dtype not in FLOATS:
        raise BadDataError(
            f"{info.name} is {info.dtype} in the student, expected one of {', '.join(FLOATS)}",
            "Use the unquantised student",
        )
    return architecture.checkpoint.read(info.name)


def change_norm(new: torch.Tensor, base: torch.Tensor) -> float:
    """The Frobenius norm of ``W' - W``, both ``(V, d)``: differences in fp32, summed in double precision."""
    return norm_of_blocks(new[rows].float() - base[rows].float() for rows in row_blocks(*new.shape))


def norm_of_blocks(blocks: Iterable[torch.Tensor]) -> float:
    """The Frobenius norm of a matrix given in blocks of rows, summed in double precision."""
    import torch

    norms = [float(torch.linalg.vector_norm(block, dtype=torch.float64)) for block in blocks]
    return math.hypot(*norms)


def shifted(
    base: torch.Tensor,
    change: Callable[[slice], torch.Tensor],
    factor: float,
    dtype: torch.dtype,
    what: str,
) -> Iterator[torch.Tensor]:
    """``W + factor · change`` in blocks of rows, summed in fp32 (fp64 for fp64) and rounded once to ``dtype``.

    Args:
        base: W ``(V, d)``.
        change: The change of some rows.
        factor: Its factor; 0 gives W.
        dtype: Of the result.
        what: The tensor's name for errors.

    Raises:
        BadDataError: A value leaves the range of ``dtype``.
    """
    import torch

    for rows in row_blocks(base.shape[0], base.shape[1]):
        wide = base[rows].double() if torch.float64 in (base.dtype, dtype) else base[rows].float()
        block = (wide if factor == 0.0 else wide + factor * change(rows).to(wide.dtype)).to(dtype)
        if not bool(torch.isfinite(block).all()):
            raise BadDataError(f"{what}: values that are not finite in {dtype}", "Use a smaller factor")
        yield block


def replaced_blocks(new: torch.Tensor, dtype: torch.dtype, what: str) -> Iterator[torch.Tensor]:
    """A new weight ``(V, d)`` in blocks of rows, rounded to ``dtype``.

    Raises:
        BadDataError: A value leaves the range of ``dtype``.
    """
    import torch

    for rows in row_blocks(new.shape[0], new.shape[1]):
        block = new[rows].to(dtype)
        if not bool(torch.isfinite(block).all()):
            raise BadDataError(f"{what}: merged values that are not finite in {dtype}", "Verify the adapter")
        yield block
