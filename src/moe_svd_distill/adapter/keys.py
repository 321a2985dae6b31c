"""Under which keys an adapter holds the pairs of a model's matrices.

A parameter is written in one of two ways: one pair for each stored matrix in it, under the stored names, or one pair
for all of it under PEFT's own name. `settling` finds out which.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import Tensor

from moe_svd_distill.adapter.fused import Factors, fuse, fused_rank
from moe_svd_distill.adapter.naming import lora_keys
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.architecture.matrices import Matrix
from moe_svd_distill.errors import BadDataError


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

    def under_stored_names(self) -> Target:
        """The same with a pair for each matrix, whatever PEFT makes of that."""
        return replace(self, own_keys=True)

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


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor of an adapter's file.

    Attributes:
        key: Its name in the file.
        shape: Its shape.
        make: Makes it from a function of matrix name to ``(B, A)``.
    """

    key: str
    shape: tuple[int, int]
    make: Callable[[Callable[[str], Factors]], Tensor]


def entries(keys: AdapterKeys, target: Target, module: str, rank_of: Callable[[str], int]) -> Iterator[Entry]:
    """The adapter's tensors of a parameter.

    Args:
        keys: Of the model.
        target: The parameter.
        module: What PEFT calls it.
        rank_of: Matrix to the rank of its pair.
    """
    slot = keys.architecture.skeleton.slots[target.parameter]
    if target.own_keys or not target.matrices:
        shapes = {matrix.name: matrix.shape for matrix in target.matrices}
        for name in target.names:
            stem = name.removesuffix(".weight") if target.own_keys else module
            rows, columns = shapes.get(name, (slot.shape[0], slot.shape[1]))
            yield from _entries_of_pair(stem, target, rows, columns, rank_of(name), partial(_of_matrix, name))
        return
    experts = target.matrices[0].experts
    transposed = target.matrices[0].transposed and not target.matrices[0].swapped_in_peft
    out, width = slot.shape[-2:][::-1] if transposed else slot.shape[-2:]
    yield from _entries_of_pair(module, target, out, width, experts * target.rank(rank_of), target.fused)


def _of_matrix(name: str, factors_of: Callable[[str], Factors]) -> Factors:
    return factors_of(name)


def _entries_of_pair(
    stem: str,
    target: Target,
    out: int,
    width: int,
    rank: int,
    factors: Callable[[Callable[[str], Factors]], Factors],
) -> Iterator[Entry]:
    """PEFT keeps the pair of embeddings transposed: A (rank, vocabulary), B (hidden, rank)."""
    key_a, key_b = lora_keys(stem, embedding=target.embedding)
    if target.embedding:
        yield Entry(key_a, (rank, out), lambda factors_of: factors(factors_of)[0].T)
        yield Entry(key_b, (width, rank), lambda factors_of: factors(factors_of)[1].T)
    else:
        yield Entry(key_a, (rank, width), lambda factors_of: factors(factors_of)[1])
        yield Entry(key_b, (out, rank), lambda factors_of: factors(factors_of)[0])
