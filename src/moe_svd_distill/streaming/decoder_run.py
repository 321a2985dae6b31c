"""The decoder's own forward with its layers exchanged, for all that lies around them.

What comes before the layers, what every layer is given besides the hidden states, and what comes after them is the
model's own code. Probes make sure that nothing happens between two layers, and that what a layer is given depends on
nothing but the shape of the batch; a decoder where it is otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moe_svd_distill.architecture.proxy import ModuleProxy
from moe_svd_distill.architecture.skeleton import Skeleton
from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.streaming.trees import map_tensors, same

_REPORT = "Report the architecture to the project"

Act: TypeAlias = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
"""What stands in for a layer: its number, the hidden states, and all else it is given; returns hidden states."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """All that a layer is given besides the hidden states, for one shape of batch.

    Attributes:
        arguments: Positional ones after the hidden states.
        keywords: The rest.
        by_name: Whether the hidden states go by the name ``hidden_states``.
        in_tuple: Whether the decoder takes the layer's result from a tuple.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    by_name: bool
    in_tuple: bool

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run a layer, (rows, length, d) to the same.

        Raises:
            IncompatiblePairError: It returns something else.
        """
        if self.by_name:
            output = layer(*self.arguments, hidden_states=hidden, **self.keywords)
        else:
            output = layer(hidden, *self.arguments, **self.keywords)
        if self.in_tuple and isinstance(output, tuple):
            output = output[0]  # the decoder ran on stand-ins that return nothing else, so it needs nothing else
        if not isinstance(output, Tensor) or output.shape != hidden.shape:
            raise IncompatiblePairError(
                f"A {type(layer).__name__} returns something else than hidden states of shape {tuple(hidden.shape)}",
                _REPORT,
            )
        return output

    def on(self, device: torch.device) -> LayerCall:
        """The same with its tensors on another device."""
        moved = map_tensors((self.arguments, dict(self.keywords)), lambda tensor: tensor.to(device))
        return LayerCall(moved[0], moved[1], self.by_name, self.in_tuple)


class DecoderRun:
    """Runs a skeleton's decoder, whose parts besides layers and embeddings are in memory.

    Raises:
        IncompatiblePairError: The decoder does something between its layers, or gives a layer something that depends on
            the tokens.
    """

    def __init__(self, skeleton: Skeleton, device: torch.device, length: int) -> None:
        self._skeleton, self._device, self._length = skeleton, device, length
        if skeleton.embedding_name is None:
            raise IncompatiblePairError(f"{type(skeleton.decoder).__name__} has no token embeddings inside", _REPORT)
        self._in_tuple = False
        first, second = self._probe(1), self._probe(2)
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            if not same((one.arguments, dict(one.keywords)), (other.arguments, dict(other.keywords))):
                raise IncompatiblePairError(
                    f"What {type(skeleton.decoder).__name__} gives layer {index} depends on the tokens", _REPORT
                )

    def calls(self, rows: int) -> list[LayerCall]:
        """What every layer is given for a batch of this many sequences."""
        return self._probe(0, rows)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (rows, length) to what the first layer gets, (rows, length, d); needs the embeddings in memory."""
        found: list[Tensor] = []

        def act(index: int, hidden: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
            if index == 0:
                found.append(hidden)
            return hidden

        with self._stand_ins(act):
            self._skeleton.decoder(input_ids=ids.to(self._device), use_cache=False)
        return found[0]

    def finish(self, states: Tensor) -> Tensor:
        """What the last layer returned, (rows, length, d), to the decoder's final hidden states; with gradients."""
        last = len(self._skeleton.originals) - 1

        def act(index: int, hidden: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
            return states if index == last else hidden

        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=self._device)
        with self._stand_ins(act), self._without_embedding(None):
            output = self._skeleton.decoder(input_ids=ids, use_cache=False)
        final: Tensor = output.last_hidden_state
        if final.shape[:2] != states.shape[:2]:
            raise IncompatiblePairError(
                f"{type(self._skeleton.decoder).__name__} ends in states of shape {tuple(final.shape)}", _REPORT
            )
        return final

    @torch.no_grad()
    def _probe(self, seed: int, rows: int = 1) -> list[LayerCall]:
        """Noise as embeddings and as every layer's result: what does each layer get?"""
        try:
            return self._probe_once(seed, rows)
        except _UnexpectedInputError as error:
            if self._in_tuple:
                raise IncompatiblePairError(
                    f"{type(self._skeleton.decoder).__name__} changes the hidden states before layer {error.index}",
                    _REPORT,
                ) from None
            self._in_tuple = True  # some decoders take a layer's result out of a tuple
            return self._probe(seed, rows)

    def _probe_once(self, seed: int, rows: int) -> list[LayerCall]:
        generator = torch.Generator().manual_seed(seed)
        calls: list[LayerCall] = []
        last: Tensor | None = None  # one noise at a time: all layers' together would be as large as a layer or larger

        def act(index: int, hidden: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
            nonlocal last
            if index != len(calls):
                raise IncompatiblePairError(
                    f"{type(self._skeleton.decoder).__name__} does not run its layers one after the other", _REPORT
                )
            if last is not None and not (isinstance(hidden, Tensor) and same(hidden, last)):
                raise _UnexpectedInputError(index)
            by_name = "hidden_states" in keywords
            rest = {name: value for name, value in keywords.items() if name != "hidden_states"}
            calls.append(LayerCall(arguments, rest, by_name, self._in_tuple))
            last = torch.randn(hidden.shape, generator=generator).to(hidden)
            return last

        vocabulary = self._skeleton.model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (rows, self._length), generator=generator).to(self._device)
        with self._stand_ins(act), self._without_embedding(generator):
            try:
                self._skeleton.decoder(input_ids=ids, use_cache=False)
            except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
                if not self._in_tuple:
                    raise _UnexpectedInputError(len(calls)) from error
                raise IncompatiblePairError(
                    f"{type(self._skeleton.decoder).__name__} does not run without its layers ({error})", _REPORT
                ) from error
        if len(calls) != len(self._skeleton.originals):
            raise IncompatiblePairError(f"{type(self._skeleton.decoder).__name__} runs only some layers", _REPORT)
        return calls

    @contextmanager
    def _stand_ins(self, act: Act) -> Iterator[None]:
        layers, originals = self._skeleton.layers, self._skeleton.originals
        try:
            for index, original in enumerate(originals):
                layers[index] = _StandIn(original, index, act, self._in_tuple)
            yield
        finally:
            for index, original in enumerate(originals):
                layers[index] = original

    @contextmanager
    def _without_embedding(self, generator: torch.Generator | None) -> Iterator[None]:
        """Zeros, or noise, in place of the embeddings, whose weights are not in memory."""
        assert self._skeleton.embedding_name is not None
        path, _, attribute = self._skeleton.embedding_name.rpartition(".")
        parent = self._skeleton.decoder.get_submodule(path)
        original = getattr(parent, attribute)
        shape: tuple[int, ...] = self._skeleton.embedding.weight.shape  # type: ignore[assignment]
        # Decoders ask the weight for its device and type.
        weight = torch.zeros((), dtype=self._skeleton.dtype, device=self._device).expand(shape)
        setattr(parent, attribute, _NoEmbedding(original, weight, generator))
        try:
            yield
        finally:
            setattr(parent, attribute, original)


class _UnexpectedInputError(Exception):
    """A layer does not get what the layer before it returned."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class _StandIn(ModuleProxy):
    def __init__(self, original: nn.Module, index: int, act: Act, in_tuple: bool) -> None:
        super().__init__(original)
        object.__setattr__(self, "_call", (index, act, in_tuple))

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        index, act, in_tuple = object.__getattribute__(self, "_call")
        hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
        rest = arguments if "hidden_states" in keywords else arguments[1:]
        output = act(index, hidden, rest, keywords)
        return (output,) if in_tuple else output


class _NoEmbedding(ModuleProxy):
    def __init__(self, original: nn.Module, weight: Tensor, generator: torch.Generator | None) -> None:
        super().__init__(original)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "_generator", generator)

    def forward(self, ids: Tensor) -> Tensor:
        weight, generator = object.__getattribute__(self, "weight"), object.__getattribute__(self, "_generator")
        shape = (*ids.shape, weight.shape[-1])
        if generator is None:
            return torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        return torch.randn(shape, generator=generator).to(weight)
