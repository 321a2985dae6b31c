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
from moe_svd_distill.adapter.naming import EMBEDDING, HEAD
from moe_svd_distill.adapter.pair_shapes import WholeShape
from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint
from moe_svd_distill.errors import BadDataError, UsageError
from moe_svd_distill.families.registry import family_of

if TYPE_CHECKING:
    import torch

FLOATS = ("F64", "F32", "F16", "BF16")


def student_of(student: Checkpoint | Path | str | None, configuration: Mapping[str, Any], purpose: str) -> Checkpoint:
    """The student whose head is the base: the one given, else the base model of the configuration if it lies here.

    Args:
        student: What the caller was given.
        configuration: The content of adapter_config.json.
        purpose: What the base is needed for, in the words of an error.

    Raises:
        UsageError: There is none at hand.
    """
    if isinstance(student, Checkpoint):
        return student
    named = configuration.get("base_model_name_or_path")
    if student is None and isinstance(named, str) and named and (Path(named) / "config.json").is_file():
        student = named
    if student is None:
        raise UsageError(
            f"{purpose} needs the student's own {HEAD}, because the adapter saves it whole, and no student is at hand",
            "Give the student",
        )
    return open_checkpoint(student)


def base_name(checkpoint: Checkpoint, hub_name: str) -> str:
    """The tensor that holds the student's own head: the embeddings where the two are tied.

    Raises:
        BadDataError: The student has no such tensor, or is tied in config.json and has another head in its files.
    """
    tied = family_of(checkpoint.config, checkpoint.source).geometry(checkpoint.config).tied_embeddings
    name = EMBEDDING if tied else hub_name
    if name not in checkpoint:
        raise BadDataError(f"{checkpoint.source} has no {name}", "Use the student the adapter was made for")
    if tied and hub_name in checkpoint:
        import torch

        if not torch.equal(checkpoint.read(hub_name), checkpoint.read(EMBEDDING)):
            raise BadDataError(
                f"{checkpoint.source} ties its head to its embeddings in config.json, but {hub_name} and {EMBEDDING} "
                "differ in its files: loaders disagree on which counts",
                "Set tie_word_embeddings to what is meant, or remove the tensor that is not used",
            )
    return name


def base_head(checkpoint: Checkpoint, shape: WholeShape) -> torch.Tensor:
    """The student's own head ``(V, d)`` as stored; the rest of the student may be quantised.

    Raises:
        BadDataError: It is not there, has another shape, or is not stored as floating-point numbers.
    """
    info = checkpoint[base_name(checkpoint, shape.hub_name)]
    if info.shape != (shape.rows, shape.columns):
        raise BadDataError(
            f"{info.name} is {'×'.join(map(str, info.shape))} in the student, the adapter's head saved whole is "
            f"{shape.rows}×{shape.columns}",
            "Use the student the adapter was made for",
        )
    if info.dtype not in FLOATS:
        raise BadDataError(
            f"{info.name} is {info.dtype} in the student, expected one of {', '.join(FLOATS)}",
            "Use the unquantised student",
        )
    return checkpoint.read(info.name)


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
