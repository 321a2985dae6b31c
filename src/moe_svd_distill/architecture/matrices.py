"""The matrices of decoder layers that an adapter can change: where each lies in memory and in the checkpoint.

What a parameter is follows from its module alone: `nn.Linear` is a linear map, other matrices named ``weight`` are
routers and the like, and three-dimensional ones hold a matrix for each expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from moe_svd_distill.architecture.skeleton import ParameterSlot, Part, Skeleton
from moe_svd_distill.architecture.stored import CheckpointMap, StoredSlice, TensorSource

_TOKENS, _VALUE = 8, 0.01


class Kind(StrEnum):
    """What a matrix is for PEFT."""

    LINEAR = "linear"
    PARAMETER = "parameter"
    EXPERT = "expert"


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix ``(out, in)`` inside a parameter of a layer; it has a value while the layer is in memory.

    Attributes:
        name: The stored tensor's name. Of a tensor that holds all experts, with the expert's number:
            ``….gate_up_proj[3]``. Where transformers makes the parameter from several tensors by an operation, its
            name in memory takes the place of the stored one.
        kind: What it is for PEFT.
        part: The layer.
        slot: The parameter in memory that holds it, perhaps beside others.
        piece: Where in it; its `hub_name` is a stored tensor's only where `stored` says so.
        transposed: Whether memory holds ``(in, out)``.
        stored: Whether the matrix is a stored tensor by itself.
    """

    name: str
    kind: Kind
    part: Part
    slot: ParameterSlot
    piece: StoredSlice
    transposed: bool = False
    stored: bool = True

    @property
    def swapped_in_peft(self) -> bool:
        """Whether PEFT takes its outputs for its inputs: its module does not say that it is held transposed."""
        return self.transposed and not getattr(self.slot.module, "is_transposed", False)

    @property
    def parameter(self) -> nn.Parameter:
        """What holds it now; another one each time the layer is read."""
        found = self.slot.module._parameters[self.slot.attribute]
        assert isinstance(found, nn.Parameter)
        return found

    @property
    def experts(self) -> int:
        """How many experts the parameter holds; 1 where it is one matrix."""
        return 1 if self.piece.index is None else self.slot.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, (out, in)."""
        rows, columns = self.within(self.parameter.data).shape
        return rows, columns

    @property
    def value(self) -> Tensor:
        """A view of the weight, (out, in)."""
        return self.within(self.parameter.data)

    @property
    def gradient(self) -> Tensor | None:
        """A view of the gradient by the weight, (out, in); None where none has reached it, as in an indexer."""
        return None if self.parameter.grad is None else self.within(self.parameter.grad)

    def within(self, whole: Tensor) -> Tensor:
        """A view of the matrix, (out, in), in a tensor of the parameter's shape."""
        region = self.piece.within(whole)
        return region.mT if self.transposed else region


@dataclass(frozen=True, eq=False)
class LayerMatrices:
    """What an adapter can change in the decoder layers, and what it cannot.

    Attributes:
        of_layer: Layer to its matrices.
        left_out: Stored tensor of the layers to the reason why no pair can change it.
    """

    of_layer: Mapping[int, tuple[Matrix, ...]]
    left_out: Mapping[str, str]

    def __iter__(self) -> Iterator[Matrix]:
        return (matrix for layer in sorted(self.of_layer) for matrix in self.of_layer[layer])


def find_matrices(skeleton: Skeleton, stored: CheckpointMap) -> LayerMatrices:
    """All matrices of the decoder layers, layer after layer."""
    hidden = skeleton.model.config.get_text_config().hidden_size
    layers = range(len(skeleton.originals))
    owners = Counter(name for layer in layers for source in stored.of_part[layer] for name in source.hub_names)
    of_layer: dict[int, tuple[Matrix, ...]] = {}
    left_out: dict[str, str] = {}
    for layer in layers:
        found: list[Matrix] = []
        for source in stored.of_part[layer]:
            shared = any(owners[name] > 1 for name in source.hub_names)
            for slot in source.slots:
                kind, reason = (None, "shared by several layers") if shared else _kind(slot)
                if kind is None:
                    left_out |= dict.fromkeys(source.hub_names, reason)
                else:
                    transposed = kind is Kind.EXPERT and _is_transposed(slot.module, hidden)
                    found += _matrices(kind, layer, slot, source, transposed)
        of_layer[layer] = tuple(found)
    return LayerMatrices(of_layer, left_out)


def _kind(slot: ParameterSlot) -> tuple[Kind | None, str]:
    """What a parameter is for PEFT, or why it is nothing to it."""
    module, sizes = slot.module, len(slot.shape)
    if slot.is_buffer:
        return None, "a buffer, which no LoRA can carry"
    if sizes < 2:
        return None, f"no LoRA can carry a {'bias' if slot.attribute == 'bias' else 'vector'}"
    if isinstance(module, nn.Embedding):
        return None, "embeddings inside a layer are not changed"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None, "a convolution"
    if type(module) is nn.Linear and slot.attribute == "weight":
        return Kind.LINEAR, ""
    if sizes == 3:
        return Kind.EXPERT, ""
    if sizes == 2 and slot.attribute == "weight" and not hasattr(module, "is_transposed"):
        if type(module).__name__ == "Conv1D":  # transformers' own: a linear map that is stored (in, out)
            return None, "a Conv1D of transformers, which holds its weight transposed"
        return Kind.PARAMETER, ""
    return None, "a matrix that is not the weight of a module"


def _is_transposed(experts: nn.Module, hidden: int) -> bool:
    """Whether experts are held (in, out).

    Where the module does not say so (Llama 4), sizes do: its first tensor takes hidden states, its last gives them.
    """
    declared = getattr(experts, "is_transposed", None)
    shapes = [parameter.shape for parameter in experts.parameters(recurse=False) if parameter.ndim == 3]
    if declared is not None or len(shapes) < 2:
        return bool(declared)
    (_, *first), (_, *last) = shapes[0], shapes[-1]
    return (first[0] == hidden and first[1] != hidden) or (last[1] == hidden and last[0] != hidden)


def _matrices(kind: Kind, layer: int, slot: ParameterSlot, source: TensorSource, transposed: bool) -> Iterator[Matrix]:
    whole = not source.pieces
    if not whole and all(len(slot.shape) - (piece.index is not None) == 2 for piece in source.pieces):
        for piece in source.pieces:
            yield Matrix(piece.hub_name, kind, layer, slot, piece, transposed)
        return
    # What is stored otherwise than as matrices is named after the tensor that holds it.
    name = next(iter(source.hub_names)) if len(source.hub_names) == 1 and len(source.slots) == 1 else slot.name
    if len(slot.shape) == 2:
        yield Matrix(name, kind, layer, slot, StoredSlice(name), stored=False)
        return
    for number in range(slot.shape[0]):
        yield Matrix(f"{name}[{number}]", kind, layer, slot, StoredSlice(name, number), transposed, stored=False)


class _Enough(Exception):  # noqa: N818 - not an error: the layers that were asked about have run
    pass


@torch.no_grad()
def never_called(skeleton: Skeleton, modules: Iterable[str], layers: int) -> set[str]:
    """Which modules the first layers do not call: what reads a module's weight alone sees no pair around it unmerged.

    They are run on a few tokens, and every weight is a constant that takes no memory.

    Args:
        skeleton: The model; nothing of it is in memory, before and after.
        modules: Names of modules inside these layers.
        layers: How many layers to run.
    """
    waiting = {name: skeleton.model.get_submodule(name) for name in modules}
    called: set[int] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(id(module))) for module in waiting.values()]
    if layers < len(skeleton.originals):
        hooks.append(skeleton.originals[layers].register_forward_pre_hook(_stop))
    slots = list(skeleton.slots.values())
    try:
        for slot in slots:
            value = torch.tensor(_VALUE if slot.dtype.is_floating_point else 1, dtype=slot.dtype)
            slot.fill(value.expand(slot.shape))
        skeleton.decoder(input_ids=torch.arange(_TOKENS)[None] % skeleton.vocabulary, use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        for slot in slots:
            slot.clear()
    return {name for name, module in waiting.items() if id(module) not in called}


def _stop(module: nn.Module, arguments: object) -> None:
    raise _Enough
