"""Under which keys an adapter holds the pairs of a model's matrices, and how several share one.

A parameter is written in one of two ways: one pair for each stored matrix in it, under the stored names, or one pair
for all of it under PEFT's own name. `settling` finds out which.

PEFT's layout of one pair for ``W (experts, out, in)``, or ``(experts, in, out)`` where it is held transposed: A is
``(experts · r, in)`` with row ``e · r + k``, and B is ``(out, r · experts)`` with column ``k · experts + e``: the
opposite order. (PEFT 0.21, ``ParamWrapper.get_delta_weight``.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from moe_svd_distill.adapter.naming import lora_keys
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.architecture.matrices import Matrix
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.planned import Planned

Factors = tuple[Tensor, Tensor]
"""``(B, A)`` of a matrix: (out, rank) and (rank, in)."""


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter that an adapter can change.

    Attributes:
        parameter: Its name in memory.
        names: The matrices in it.
        matrices: The same as they lie in it; none for the head and the embeddings.
        as_parameter: Whether PEFT is told the parameter's name rather than its module's.
        own_keys: Whether each matrix has a pair of its own under its stored name; else the parameter has one pair under
            PEFT's name for it.
        embedding: Whether it is the table of the token embeddings.
    """

    parameter: str
    names: tuple[str, ...]
    matrices: tuple[Matrix, ...]
    as_parameter: bool
    own_keys: bool
    embedding: bool = False

    @property
    def module(self) -> str:
        """Its module's name."""
        return self.parameter.rpartition(".")[0]

    @property
    def entry(self) -> str:
        """What PEFT is told."""
        return self.parameter if self.as_parameter else self.module

    def rank(self, rank_of: Callable[[str], int]) -> int:
        """The rank PEFT needs for it."""
        return fused_rank(self.matrices, rank_of) if self.matrices else rank_of(self.names[0])

    def fused(self, factors_of: Callable[[str], Factors]) -> Factors:
        """``(B, A)`` of the whole parameter."""
        return fuse(self.matrices, factors_of) if self.matrices else factors_of(self.names[0])


@dataclass(frozen=True, eq=False)
class AdapterKeys:
    """What a PEFT adapter of a model can change, and how it is written.

    Attributes:
        architecture: The model.
        targets: Parameter to how it is written, the head and the embeddings included.
        left_out: Name of a matrix, or of another stored tensor of the layers, to why no pair can change it.
    """

    architecture: Architecture
    targets: Mapping[str, Target]
    left_out: Mapping[str, str]

    @property
    def layers(self) -> Iterator[Target]:
        """The targets in the decoder layers."""
        return (target for target in self.targets.values() if target.matrices)

    def matrices(self) -> dict[str, Matrix]:
        """Every matrix of the layers that a pair can change, by name."""
        return {matrix.name: matrix for target in self.layers for matrix in target.matrices}

    def reason_against(self, name: str) -> str:
        """Why no adapter can hold a pair of a matrix; empty where one can."""
        if name in self._names:
            return ""
        stored = name.partition("[")[0]
        return self.left_out.get(name) or self.left_out.get(stored) or "transformers joins it with others on loading"

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(name for target in self.targets.values() for name in target.names)

    def changed_by(self, names: Collection[str]) -> list[Target]:
        """The parameters in which matrices of these names lie.

        Raises:
            BadDataError: No adapter can hold a pair of one of them.
        """
        wanted = set(names)
        found = [target for target in self.targets.values() if not wanted.isdisjoint(target.names)]
        if lacking := wanted - {name for target in found for name in target.names}:
            name = min(lacking)
            reason = self.left_out.get(name, "the model has no such matrix")
            raise BadDataError(f"{name}: no adapter can hold a pair of it: {reason}", "Leave the pair out")
        return found

    def with_one_pair_a_parameter(self) -> AdapterKeys:
        """The same with every parameter of experts written under PEFT's own name."""
        changed = {
            name: replace(target, own_keys=target.own_keys and len(target.names) == 1)
            for name, target in self.targets.items()
        }
        return replace(self, targets=changed)


class Pairs(Protocol):
    """Pairs of a student's matrices, each made when it is asked for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of all factors."""

    def rank(self, name: str) -> int:
        """The rank of a matrix's pair."""

    def factors(self, name: str) -> Factors:
        """``(B, A)`` of a matrix."""


def planned_tensors(
    keys: AdapterKeys, targets: Iterable[Target], modules: Mapping[str, str], pairs: Pairs
) -> dict[str, Planned]:
    """The tensors of an adapter's file, under the keys that bring them to their parameters.

    Args:
        keys: Of the model.
        targets: The parameters to change.
        modules: Parameter to what PEFT calls it, for those whose matrices have no keys of their own.
        pairs: The pairs of their matrices.
    """
    planned: dict[str, Planned] = {}
    for target in targets:
        slot, module = keys.architecture.skeleton.slots[target.parameter], modules.get(target.parameter, "")
        if target.own_keys or not target.matrices:
            shapes = {matrix.name: matrix.shape for matrix in target.matrices}
            for name in target.names:
                stem = name.removesuffix(".weight") if target.own_keys else module
                out, width = shapes.get(name, slot.shape[:2])
                factors = partial(pairs.factors, name)
                planned |= _planned_pair(stem, (out, pairs.rank(name), width), factors, pairs.dtype, target.embedding)
            continue
        first = target.matrices[0]
        transposed = first.transposed and not first.swapped_in_peft
        out, width = slot.shape[-2:][::-1] if transposed else slot.shape[-2:]
        rank = first.experts * target.rank(pairs.rank)
        planned |= _planned_pair(module, (out, rank, width), partial(target.fused, pairs.factors), pairs.dtype)
    return planned


def _planned_pair(
    stem: str,
    sizes: tuple[int, int, int],
    factors: Callable[[], Factors],
    dtype: torch.dtype,
    embedding: bool = False,
) -> dict[str, Planned]:
    """PEFT keeps the pair of embeddings transposed: A (rank, vocabulary), B (hidden, rank)."""
    out, rank, width = sizes
    key_a, key_b = lora_keys(stem, embedding=embedding)
    if embedding:
        return {
            key_a: Planned((rank, out), dtype, lambda: factors()[0].T),
            key_b: Planned((width, rank), dtype, lambda: factors()[1].T),
        }
    return {
        key_a: Planned((rank, width), dtype, lambda: factors()[1]),
        key_b: Planned((out, rank), dtype, lambda: factors()[0]),
    }


def fused_rank(matrices: Sequence[Matrix], rank_of: Callable[[str], int]) -> int:
    """The rank of a parameter: that of its matrices, summed where several lie beside each other in one expert."""
    first = matrices[0].piece.index
    return sum(rank_of(matrix.name) for matrix in matrices if matrix.piece.index == first)


def fuse(matrices: Sequence[Matrix], factors_of: Callable[[str], Factors]) -> Factors:
    """The pair of a parameter from those of all matrices in it, which have the same ranks for all experts."""
    if matrices[0].piece.index is None:
        return factors_of(matrices[0].name)
    shape = matrices[0].slot.shape
    out, width = (shape[2], shape[1]) if matrices[0].transposed else (shape[1], shape[2])
    swapped = matrices[0].swapped_in_peft
    lefts, rights = [], []
    for expert in range(shape[0]):
        columns, rows = [], []
        for matrix in (matrix for matrix in matrices if matrix.piece.index == expert):
            left, right = factors_of(matrix.name)
            columns.append(_widened(left.T, matrix, of_rows=True, size=out).T)
            rows.append(_widened(right, matrix, of_rows=False, size=width))
        left, right = torch.cat(columns, dim=1), torch.cat(rows)
        lefts.append(right.T if swapped else left)
        rights.append(left.T if swapped else right)
    left = torch.stack(lefts).permute(1, 2, 0).reshape(width if swapped else out, -1)
    return left.contiguous(), torch.cat(rights).contiguous()


def expert_factors(left: Tensor, right: Tensor, experts: int, number: int) -> Factors:
    """``(B, A)`` of one expert in the pair of a parameter, as views."""
    rank = right.shape[0] // experts
    return left.view(len(left), rank, experts)[:, :, number], right.view(experts, rank, -1)[number]


def of_matrix(matrix: Matrix, factors: Factors) -> Factors:
    """``(B, A)`` of a matrix from those that PEFT has for the whole expert it lies in."""
    left, right = (factors[1].T, factors[0].T) if matrix.swapped_in_peft else factors
    begin, length = matrix.piece.begin, matrix.piece.length
    if begin is None:
        return left, right
    part = slice(begin, begin + length)
    return (left[part], right) if _narrows_rows(matrix) else (left, right[:, part])


def _widened(factor: Tensor, matrix: Matrix, *, of_rows: bool, size: int) -> Tensor:
    """A factor (rank, n) with zeros where the other matrices of its expert lie."""
    begin, length = matrix.piece.begin, matrix.piece.length
    if begin is None or _narrows_rows(matrix) != of_rows:
        return factor
    return torch.nn.functional.pad(factor, (begin, size - begin - length))


def _narrows_rows(matrix: Matrix) -> bool:
    """Whether a matrix takes some of its expert's rows (outputs), rather than some of its columns."""
    return (matrix.piece.dim == 0) != matrix.transposed
