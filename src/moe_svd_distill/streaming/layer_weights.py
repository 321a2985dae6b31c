"""Where the stored matrices of a decoder layer lie in memory, for those that change them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from moe_svd_distill.streaming.skeleton import Place
from moe_svd_distill.streaming.sources import Origin, Piece


@dataclass(frozen=True, eq=False)
class LayerWeight:
    """One stored tensor inside a parameter of a layer; it has a value while the layer is in memory.

    Attributes:
        hub_name: Its name in the checkpoint.
        place: The parameter in memory that holds it, perhaps beside others.
        piece: Where in it.
    """

    hub_name: str
    place: Place
    piece: Piece

    @property
    def parameter(self) -> nn.Parameter:
        """What holds it now; another one each time the layer is read."""
        found = self.place.module._parameters[self.place.attribute]
        assert isinstance(found, nn.Parameter)
        return found

    @property
    def value(self) -> Tensor:
        """A view of the weight, (rows, columns)."""
        return self.piece.within(self.parameter.data)

    @property
    def gradient(self) -> Tensor:
        """A view of the gradient by the weight, (rows, columns)."""
        assert self.parameter.grad is not None
        return self.piece.within(self.parameter.grad)


def layer_weights(origins: list[Origin]) -> tuple[list[LayerWeight], list[str]]:
    """The matrices of a layer that lie in one place each, and those that an operation of transformers takes apart.

    The latter cannot be changed where they lie.
    """
    movable: list[LayerWeight] = []
    fixed: list[str] = []
    for origin in origins:
        if not origin.pieces:
            fixed += [name for _, name in origin.hub_names]
            continue
        place = origin.places[0]
        if not place.is_buffer:
            found = [LayerWeight(piece.hub_name, place, piece) for piece in origin.pieces]
            movable += [weight for weight in found if weight.value.dim() == 2]
    return movable, fixed
