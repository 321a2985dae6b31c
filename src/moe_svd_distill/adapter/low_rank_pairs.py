"""An adapter's pairs as a read-only mapping, and its head saved whole; tensors are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.adapter.adapter_file import adapter_header, read_tensor, shapes_of
from moe_svd_distill.adapter.pair_shapes import PairShape, WholeShape, pair_shapes, whole_shapes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LowRankPair:
    """The two factors of one change.

    Attributes:
        shape: Names and sizes.
        a: A as stored, ``(rank, in)``.
        b: B as stored, ``(out, rank)``.
    """

    shape: PairShape
    a: torch.Tensor
    b: torch.Tensor

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Left ``(rows, rank)`` and right ``(rank, columns)``, whose product has the shape of the changed tensor."""
        return (self.a.T, self.b.T) if self.shape.transposed else (self.b, self.a)

    def norm(self) -> float:
        """The Frobenius norm of ``B @ A``, from two rank×rank matrices: the product itself is never formed."""
        return frobenius_of_product(self.a, self.b)

    def is_zero(self) -> bool:
        """Whether the pair changes nothing, because one of its factors is zero throughout."""
        return not bool(self.a.any()) or not bool(self.b.any())


class LowRankPairs(Mapping[str, LowRankPair]):
    """Hub name to pair, in order of the names.

    Args:
        path: The adapter's folder or file. Its header is checked at once.

    Attributes:
        shapes: Hub name to the sizes of its pair.
        whole: Hub name to what is replaced whole and has no pair; not part of the mapping.

    Raises:
        MissingInputError: There is no such file.
        BadDataError: The header is damaged, or its tensors are not whole pairs under names PEFT matches.
    """

    def __init__(self, path: Path | str) -> None:
        self.header = adapter_header(path)
        self.shapes: dict[str, PairShape] = pair_shapes(shapes_of(self.header))
        self.whole: dict[str, WholeShape] = whole_shapes(shapes_of(self.header))

    def __getitem__(self, hub_name: str) -> LowRankPair:
        shape = self.shapes[hub_name]
        tensors = self.header.tensors
        return LowRankPair(shape, read_tensor(tensors[shape.key_a]), read_tensor(tensors[shape.key_b]))

    def read_whole(self, hub_name: str) -> torch.Tensor:
        """The new weight ``(rows, columns)`` of a tensor that is replaced whole, as stored.

        Raises:
            KeyError: It is not replaced whole.
        """
        return read_tensor(self.header.tensors[self.whole[hub_name].key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def frobenius_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """``‖B A‖`` for A ``(r, in)`` and B ``(out, r)``: the root of the inner product of ``BᵀB`` and ``AAᵀ``."""
    a, b = a.double(), b.double()
    square = float(((b.T @ b) * (a @ a.T)).sum())
    return float(max(square, 0.0) ** 0.5)
