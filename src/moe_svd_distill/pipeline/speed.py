"""How fast this machine runs a model: a layer of each kind and its head, run for a moment on made-up tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from moe_svd_distill.algebra.dtypes import matmul_dtype
from moe_svd_distill.streaming import Decoder, load_head
from moe_svd_distill.training.job import threads
from moe_svd_distill.training.lora_parameters import LoraParameters

if TYPE_CHECKING:
    from moe_svd_distill.checkpoints import Checkpoint

_MOST_KINDS = 6  # measured behind the first layer; where there are more, some evenly among them
_HEAD_PLACES, _REPEATS = 128, 2
Result = TypeVar("Result")


@dataclass(frozen=True)
class LayerSeconds:
    """Seconds of a layer, or of all of them.

    Attributes:
        loading: Of reading its weights.
        forward: Of a token, forward.
        learning: Of a token, forward and backward with pairs; 0 for a model that is only read.
        composing: Of putting the pairs into the weights, which each step of training does; the same.
    """

    loading: float
    forward: float
    learning: float = 0.0
    composing: float = 0.0


@dataclass(frozen=True)
class HeadSeconds:
    """Seconds of a token's logits and their softmax.

    Attributes:
        plain: In float32.
        rounded: With products in the type that large heads are multiplied in.
    """

    plain: float
    rounded: float


def reading_speed(
    checkpoint: Checkpoint, device: str, dtype: torch.dtype, length: int, batch_tokens: int
) -> LayerSeconds:
    """Seconds of all layers where a pass reads a text, which it does with a batch on each core of a CPU."""
    if device != "cpu":
        return layer_speed(checkpoint, device, dtype, length, batch_tokens, {})
    cores = torch.get_num_threads()
    with threads(1):
        found = layer_speed(checkpoint, device, dtype, length, batch_tokens, {})
    return LayerSeconds(found.loading, found.forward / cores)


@torch.no_grad()
def head_speed(checkpoint: Checkpoint, device: str) -> HeadSeconds:
    """Seconds of a token in a model's head.

    Raises:
        BadDataError: The head is missing.
        IncompatiblePairError: The model has no head, or does something unknown after it.
    """
    place = torch.device(device)
    head = load_head(checkpoint, device, torch.float32).weight

    def seconds(dtype: torch.dtype) -> float:
        weight = head.to(dtype)
        states = torch.ones(_HEAD_PLACES, head.shape[1], device=place, dtype=dtype)
        found, _ = _timed(lambda: torch.softmax((states @ weight.T).float(), dim=-1), place)
        return found / _HEAD_PLACES

    return HeadSeconds(seconds(torch.float32), seconds(matmul_dtype(place)))


def layer_speed(
    checkpoint: Checkpoint,
    device: str,
    dtype: torch.dtype,
    length: int,
    batch_tokens: int,
    ranks: Mapping[str, int],
) -> LayerSeconds:
    """Seconds of all layers on one batch: of the first, and of one of each kind behind it as often as there are such.

    Args:
        checkpoint: The model; its weights lie on this machine.
        device: Where to compute.
        dtype: Type to compute in.
        length: Tokens of a sequence.
        batch_tokens: Tokens of the batch.
        ranks: Of every matrix that is trained; none for a model that is only read.

    Raises:
        BadDataError: A tensor is missing, or has a wrong shape or no place.
        IncompatiblePairError: The architecture cannot be run layer by layer.
    """
    place = torch.device(device)
    decoder = Decoder(checkpoint, (place,), dtype, gradients=bool(ranks))
    ids = torch.randint(
        decoder.skeleton.vocabulary,
        (max(1, batch_tokens // length), length),
        generator=torch.Generator().manual_seed(0),
    ).to(place)
    trial = _LayerTrial(decoder, place, ids, ranks)
    try:
        kinds = [_kind(decoder, layer) for layer in range(decoder.layers)]
        firsts = [kinds.index(kind, 1) for kind in dict.fromkeys(kinds[1:])]
        chosen = firsts[:: -(-len(firsts) // _MOST_KINDS) or 1]
        found = {layer: seconds for layer in (0, *chosen) if (seconds := trial.layer(layer)) is not None}
        sizes = [sum(prod(shape) for _, shape in kind) for kind in kinds]

        def like(layer: int) -> LayerSeconds:
            """Of a layer of its kind; where none could be run, of the one nearest to it in size."""
            first = layer and kinds.index(kinds[layer], 1)
            return found[min(found, key=lambda one: (one != first, abs(sizes[one] - sizes[layer]), -one))]

        of_layers = [like(layer) for layer in range(decoder.layers)]
        return LayerSeconds(*(sum(getattr(of, field.name) for of in of_layers) for field in fields(LayerSeconds)))
    finally:
        decoder.close()


def _kind(decoder: Decoder, layer: int) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a layer's parameters: layers that have the same ones take the same time."""
    name = f"{decoder.skeleton.prefix}{layer}."
    return frozenset((slot.name.removeprefix(name), slot.shape) for slot in decoder.skeleton.of_part(layer))


class _LayerTrial:
    """Some layers of a decoder, one after another, on one batch."""

    def __init__(self, decoder: Decoder, place: torch.device, ids: Tensor, ranks: Mapping[str, int]) -> None:
        self.decoder, self.place, self.ids, self.ranks = decoder, place, ids, ranks
        self.few = ids[:1]  # what passes the gates is found on these
        self.at = 0  # the gate that the following was recorded at
        self.skipped = False  # whether layers were left out before it
        self.given: list[Tensor] = []
        self.given_few: list[Tensor] = []

    def layer(self, layer: int) -> LayerSeconds | None:
        """Seconds of a layer; None where it needs more than those before it have left."""
        decoder, place, tokens = self.decoder, self.place, self.ids.numel()
        bank = None
        if self.ranks:  # before the layer is there: pairs act in copies that are made of it
            bank = LoraParameters({layer: decoder.matrices.of_layer.get(layer, ())}, self.ranks, place, {}, 0)
        loading, _ = _timed(lambda: decoder.enter(layer), place, 1)
        try:
            if layer > self.at:
                self._skip_to(layer)
            learning = composing = 0.0
            with torch.no_grad():
                after_few = self._run(layer, self.few, _copies(self.given_few))
                forward, after = _timed(lambda: self._run(layer, self.ids, _copies(self.given)), place)
            if bank is not None:
                composing, _ = _timed(lambda: bank.compose(layer, bank.bases(layer)), place)
                bank.hook_gradients(layer)
                learning, _ = _timed(lambda: self._learn(layer), place)
        except Exception as error:  # what it misses of the layers in between shows itself in its own code
            if not self.skipped or isinstance(error, torch.OutOfMemoryError):
                raise
            return None
        finally:
            decoder.leave(layer)
        self.at, self.given, self.given_few = layer + 1, after, after_few
        return LayerSeconds(loading, forward / tokens, learning / tokens, composing)

    def _skip_to(self, layer: int) -> None:
        """Take it that the layers in between hand on what the one before them did."""
        self.skipped = True
        layout = self.decoder.layout
        known = layout.encode(self.at)
        layout.decode(layer, {**known, "outputs": known["outputs"] + known["outputs"][-1:] * (layer - self.at)})

    def _run(self, layer: int, ids: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
        """What is recorded behind a layer; behind the last, the final states."""
        if layer + 1 == self.decoder.layers:
            return [self.decoder.states(ids, layer, given)]
        return self.decoder.step(layer, ids, given)

    def _learn(self, layer: int) -> None:
        before = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in self.given]
        with torch.enable_grad():
            after = self._run(layer, self.ids, [tensor.clone() for tensor in before])
            moved = [tensor for tensor in after if tensor.requires_grad]
        torch.autograd.backward(moved, [torch.ones_like(tensor) for tensor in moved])


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]  # a layer may write into what it is given


def _timed(act: Callable[[], Result], place: torch.device, times: int = _REPEATS) -> tuple[float, Result]:
    """Seconds of the fastest of a few times, and what the last one gave."""
    seconds, result = [], None
    for _ in range(times):
        begin = time.perf_counter()
        result = act()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        seconds.append(time.perf_counter() - begin)
    return min(seconds), cast("Result", result)
