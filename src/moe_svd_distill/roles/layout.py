"""A model's tensors, each with its meaning, and the matrices inside them: the weights stage works on these."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from moe_svd_distill.roles import table
from moe_svd_distill.roles.table import ROLES

if TYPE_CHECKING:
    from torch import Tensor

HEAD_IS_TIED = "the head is tied to the embeddings"


@dataclass(frozen=True, slots=True)
class TensorView:
    """A matrix ``(out, in)`` in a stored tensor: of an expert, transposed, some of its rows; or the whole tensor.

    Attributes:
        stored: Hub name of the stored tensor.
        expert: Where along its first dimension, if it has three.
        part: What the rows are called, where they are not all.
        transposed: Whether it is stored ``(in, out)``.
        start: First row.
        step: From one row to the next: 2 where two matrices are interleaved.
        rows: How many; None for all.
    """

    stored: str
    expert: int | None = None
    part: str = ""
    transposed: bool = False
    start: int = 0
    step: int = 1
    rows: int | None = None

    @property
    def matrix(self) -> str:
        """Name of the whole matrix it lies in, as `architecture.matrices` has it."""
        return self.stored if self.expert is None else f"{self.stored}[{self.expert}]"

    @property
    def name(self) -> str:
        """Its own name: that of the matrix if it is all of it."""
        return f"{self.matrix}.{self.part}" if self.part else self.matrix

    def within(self, matrix: Tensor) -> Tensor:
        """The rows in the matrix as it is stored, without a copy."""
        return self.rows_of(matrix.mT if self.transposed else matrix)

    def rows_of(self, matrix: Tensor) -> Tensor:
        """The rows in the whole matrix, (out, in), without a copy."""
        return matrix if self.rows is None else matrix[self.start :: self.step][: self.rows]


Shape = tuple[int, ...]
Place = tuple[str, int | None, int | None]


@dataclass(frozen=True, slots=True)
class Meaning:
    """What one matrix or vector is.

    Attributes:
        role: Its role; of a matrix, one of `table.ROLES`.
        layer: Decoder layer, or None outside the layers.
        expert: Expert number, or None.
        view: Where it is stored.
        shape: Its shape, (out, in) of a matrix.
    """

    role: str
    layer: int | None
    expert: int | None
    view: TensorView
    shape: Shape

    @property
    def is_matrix(self) -> bool:
        """Whether the weights stage can change it."""
        return self.role in ROLES and ROLES[self.role].is_matrix


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model; 0 where it has nothing of the kind.

    Attributes:
        neurons: Width of a dense MLP.
        experts: Routed experts of a mixture-of-experts layer, the most that a layer has.
        expert_neurons: Width of one routed expert.
        tied_embeddings: Whether the head is the embedding matrix.
    """

    layers: int
    hidden: int
    query_heads: int
    key_value_heads: int
    head_dimension: int
    vocabulary: int
    neurons: int
    experts: int
    experts_per_token: int
    expert_neurons: int
    tied_embeddings: bool


@dataclass(frozen=True)
class ModelLayout:
    """Every tensor of a model and what it means.

    Attributes:
        model_type: The text model's architecture, as config.json names it.
        geometry: The sizes.
        meanings: Name of a view to its meaning; a tensor that is one matrix or vector keeps its hub name.
        ignored: Hub name to the reason why no text model uses the tensor.
        without_role: Hub name to the reason why the weights stage does not know what the tensor is.
        activation: What its MLPs compute, as config.json names it.
    """

    model_type: str
    geometry: Geometry
    meanings: Mapping[str, Meaning]
    ignored: Mapping[str, str]
    without_role: Mapping[str, str]
    activation: str = ""

    @property
    def gain_offset(self) -> float:
        """What a norm adds to its weight before it multiplies by it."""
        return 1.0 if table.ONE_MORE.fullmatch(self.model_type) else 0.0

    @cached_property
    def by_place(self) -> dict[Place, str]:
        """(role, layer, expert) to name."""
        return {(m.role, m.layer, m.expert): name for name, m in self.meanings.items()}

    def find(self, role: str, layer: int | None = None, expert: int | None = None) -> str | None:
        """The name of a role at a place, or None where the model has none."""
        return self.by_place.get((role, layer, expert))

    @property
    def second_head(self) -> str | None:
        """Name of a head that is stored although config.json ties it to the embeddings."""
        return next((name for name, reason in self.ignored.items() if reason == HEAD_IS_TIED), None)

    def view(self, role: str, layer: int | None = None, expert: int | None = None) -> TensorView | None:
        """Where a role at a place is stored, or None where the model has none."""
        name = self.find(role, layer, expert)
        return None if name is None else self.meanings[name].view

    def experts_at(self, layer: int) -> int:
        """How many routed experts a layer has; 0 for a dense layer."""
        return self._experts.get(layer, 0)

    def parts_of(self, matrix: str) -> tuple[TensorView, ...]:
        """The views that make up a matrix, in order; ``matrix`` is a hub name, or ``<stored>[e]`` of an expert."""
        return self._parts.get(matrix, ())

    def parameters(self, shapes: Mapping[str, Shape]) -> tuple[int, int]:
        """How many numbers the text model has, and how many of them one token goes through.

        Of the routed experts only as many count as a token is sent to; of embeddings and head all.
        """
        total = sum(prod(shape) for name, shape in shapes.items() if name not in self.ignored)
        idle = 0.0
        for m in self.meanings.values():
            if m.layer is not None and m.role.startswith("experts."):
                idle += prod(m.shape) * max(0.0, 1 - self.geometry.experts_per_token / max(1, self.experts_at(m.layer)))
        return total, round(total - idle)

    @cached_property
    def _experts(self) -> dict[int, int]:
        counts: dict[int, int] = defaultdict(int)
        for meaning in self.meanings.values():
            if meaning.role == "experts.down" and meaning.layer is not None:
                counts[meaning.layer] += 1
        return dict(counts)

    @cached_property
    def _parts(self) -> dict[str, tuple[TensorView, ...]]:
        found: dict[str, tuple[TensorView, ...]] = {}
        for meaning in self.meanings.values():
            found[meaning.view.matrix] = (*found.get(meaning.view.matrix, ()), meaning.view)
        return found
