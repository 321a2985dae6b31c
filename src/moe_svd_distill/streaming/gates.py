"""The decoder's own forward with a gate in the place of each layer.

Whatever an architecture does before, between and after its layers is its own code, run anew for every batch. To run
some layers alone, the forward begins at its start: gates before them hand out placeholders without memory, the first of
them gets what was recorded there, and at the gate behind them the forward ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from moe_svd_distill.architecture.building import ModuleProxy
from moe_svd_distill.architecture.skeleton import Skeleton
from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.streaming.tables import StoredTable

_REPORT = "Report the architecture to the project"

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a layer."""


class Reached(NamedTuple):
    """A forward that has come to a gate.

    Attributes:
        call: What the layer there is given.
        output: What the layer before it has returned, if it has run.
    """

    call: Call
    output: Any


class GatedDecoder:
    """A decoder on one device, with a gate for each of its layers; for one thread at a time.

    Attributes:
        device: Where it computes.
        layers: Number to layer, for those that are in memory.
    """

    def __init__(self, skeleton: Skeleton, device: torch.device) -> None:
        gates: dict[int, object] = {
            id(layer): _Gate(layer, index, self) for index, layer in enumerate(skeleton.originals)
        }
        self.device = device
        self.layers: dict[int, nn.Module] = {}
        self._decoder = replicate(skeleton.decoder, device, gates)
        self._name, self._count = type(skeleton.decoder).__name__, len(skeleton.originals)
        self._next = 0
        self._act: Callable[[int, Call], Any] = _no_layer

    def run(
        self,
        ids: Tensor,
        begin: int,
        end: int,
        placeholder: Callable[[int], Any],
        given: Callable[[Call], Call] = lambda call: call,
    ) -> Reached | Tensor:
        """Run the layers from one gate to another.

        Args:
            ids: Token ids (rows, length).
            begin: The first layer that runs.
            end: The first one that does not.
            placeholder: Number of a layer before `begin` to what stands for its output.
            given: Puts what was recorded at `begin` into the layer's arguments.

        Returns:
            How far it has come; behind the last layer, the final hidden states (rows, length, d).

        Raises:
            IncompatiblePairError: The decoder does not run its layers one after the other.
        """

        def act(index: int, call: Call) -> Any:
            if index != self._next:
                raise IncompatiblePairError(f"{self._name} runs layer {index} where {self._next} was expected", _REPORT)
            self._next += 1
            if index == end:
                raise _ReachedError(Reached(call, last.pop() if last else None))
            if index < begin:
                return placeholder(index)
            arguments, keywords = given(call) if index == begin else call
            last[:] = [self.layers[index](*arguments, **keywords)]
            return last[0]

        last: list[Any] = []
        self._act, self._next = act, 0
        try:
            output = self._decoder(input_ids=ids, use_cache=False)
        except _ReachedError as error:
            return error.reached
        finally:
            self._act = _no_layer
        states: Any = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        if self._next != self._count:
            raise IncompatiblePairError(f"{self._name} runs {self._next} of its {self._count} layers", _REPORT)
        if states.ndim != 3 or states.shape[:2] != ids.shape:
            raise IncompatiblePairError(f"{self._name} ends in states of shape {tuple(states.shape)}", _REPORT)
        return states


def _no_layer(index: int, call: Call) -> Any:
    raise AssertionError(f"layer {index} is run from outside")


class _Gate(ModuleProxy):
    def __init__(self, layer: nn.Module, index: int, decoder: GatedDecoder) -> None:
        super().__init__(layer)
        object.__setattr__(self, "_place", (index, decoder))

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        index, decoder = object.__getattribute__(self, "_place")
        return decoder._act(index, (arguments, keywords))


class _ReachedError(Exception):
    """The forward has come to the gate where it ends."""

    def __init__(self, reached: Reached) -> None:
        super().__init__()
        self.reached = reached


def replicate(module: nn.Module, device: torch.device, known: dict[int, object] | None = None) -> nn.Module:
    """Copy the structure of a module, and its tensors only where they are not on the device yet.

    PEFT, visitors and some architectures change modules while they run; every device gets modules of its own for that
    reason.

    Args:
        module: It may be without memory in parts.
        device: Where the copy computes.
        known: Identity of a module inside to what takes its place.
    """
    memo = dict(known or {})
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.device == device or tensor.is_meta:
            memo[id(tensor)] = tensor
        elif isinstance(tensor, StoredTable):
            memo[id(tensor)] = tensor.on(device)
        elif isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(tensor.detach().to(device), requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = tensor.to(device)
    for inner in module.modules():
        configuration = getattr(inner, "config", None)
        if configuration is not None:
            memo[id(configuration)] = configuration
    return copy.deepcopy(module, memo)
