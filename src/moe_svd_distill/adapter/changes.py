"""An adapter's changes of a student's stored tensors, in the checkpoint's own arrangement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from moe_svd_distill.adapter.blocks import row_blocks
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.architecture.matrices import Matrix
from moe_svd_distill.architecture.stored import TensorSource
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.files.dtypes import FLOATS


class Changes:
    """Stored tensors with what an adapter makes of them: ``W + scale · B A``, rounded once to the stored dtype."""

    def __init__(self, architecture: Architecture, pairs: LowRankPairs) -> None:
        """Read headers only.

        Raises:
            BadDataError: A stored tensor is not of a floating-point dtype, or the adapter's file and configuration
                disagree.
        """
        self._checkpoint, self._pairs, self._names = architecture.checkpoint, pairs, architecture.stored.names
        self._alone: dict[str, str] = {}  # stored tensor to the one matrix that it is
        self._in_experts: dict[str, list[Matrix]] = defaultdict(list)
        self._converted: dict[str, tuple[TensorSource, list[Matrix]]] = {}
        self._restored: tuple[TensorSource, dict[str, Tensor]] | None = None
        by_parameter: dict[str, list[Matrix]] = defaultdict(list)
        for name in pairs:
            matrix = architecture.by_name.get(name)
            if matrix is None or (matrix.stored and not matrix.transposed):
                self._alone[name] = name
            else:
                by_parameter[matrix.slot.name].append(matrix)
            pairs.scale(name)
        sources = (source for sources in architecture.stored.of_part.values() for source in sources)
        for source in sources if by_parameter else ():
            matrices = [matrix for slot in source.slots for matrix in by_parameter.get(slot.name, ())]
            for _, hub_name in source.hub_names if matrices else ():
                if source.pieces:
                    self._in_experts[hub_name] = [m for m in matrices if not m.stored or m.name == hub_name]
                else:
                    self._converted[hub_name] = source, matrices
        for name in self:
            if (dtype := self._checkpoint[name].dtype) not in FLOATS:
                raise BadDataError(
                    f"{name} is {dtype} in the student, expected one of {', '.join(FLOATS)}",
                    "Use the unquantised student",
                )

    def __iter__(self) -> Iterator[str]:
        yield from (*self._alone, *self._in_experts, *self._converted)

    def __contains__(self, name: str) -> bool:
        return name in self._alone or name in self._in_experts or name in self._converted

    def __len__(self) -> int:
        return len(self._alone) + len(self._in_experts) + len(self._converted)

    def merged(self, name: str) -> Iterator[Tensor]:
        """The merged tensor in consecutive blocks of rows.

        Raises:
            BadDataError: A value is not finite.
        """
        weight = self._checkpoint.read(name)
        if name in self._alone:
            pair = self._pairs[self._alone[name]]
            yield from _sums(weight, pair.left.float(), pair.right.float(), pair.scale, name)
        elif name in self._in_experts:
            by_expert = {None if m.stored else m.piece.index: m for m in self._in_experts[name]}
            whole = weight[None] if None in by_expert else weight
            for number, expert in enumerate(whole):
                matrix = by_expert.get(number) or by_expert.get(None)
                if matrix is None:
                    yield expert
                    continue
                pair = self._pairs[matrix.name]
                left, right = pair.left.float(), pair.right.float()
                factors = (right.T, left.T) if matrix.transposed else (left, right)
                yield from _sums(expert, *factors, pair.scale, name)
        else:
            change = self._of_converted(name)
            yield from _finite((_wide(weight) + change).to(weight.dtype), name)

    def _of_converted(self, name: str) -> Tensor:
        """The change of a tensor that transformers rearranges on loading, put back into the stored arrangement."""
        source, matrices = self._converted[name]
        if self._restored is None or self._restored[0] is not source:
            made = {slot.name: torch.zeros(slot.shape) for slot in source.slots}
            for matrix in matrices:
                pair = self._pairs[matrix.name]
                region = matrix.within(made[matrix.slot.name])
                region.copy_(pair.scale * (pair.left.float() @ pair.right.float()))
            self._restored = source, source.restore(made, self._names)
        return self._restored[1][name]


def _sums(weight: Tensor, left: Tensor, right: Tensor, scale: float, name: str) -> Iterator[Tensor]:
    """``W + scale · left @ right`` for W (rows, columns), in blocks that need no second copy of W in fp32."""
    for rows in row_blocks(weight.shape[0], weight.shape[1]):
        block = weight[rows]
        yield from _finite((_wide(block) + scale * (left[rows] @ right)).to(block.dtype), name)


def _wide(block: Tensor) -> Tensor:
    return block.double() if block.dtype is torch.float64 else block.float()


def _finite(merged: Tensor, name: str) -> Iterator[Tensor]:
    if not bool(torch.isfinite(merged).all()):
        raise BadDataError(
            f"{name}: merged values that are not finite in {merged.dtype}", "Verify the adapter and the student"
        )
    yield merged
