"""What a model does between its final hidden states and its logits, measured on its own forward.

Decoder, embeddings and head are replaced by stand-ins: the one gives known states, the other sees what arrives of them
and answers with known numbers. No weight is needed, and no key of the configuration is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_svd_distill.algebra.divergence import LogitTransform
from moe_svd_distill.architecture.building import ModuleProxy, find_decoder
from moe_svd_distill.errors import IncompatiblePairError, reason_of

_REPORT = "Report the architecture to the project"
_POSITIONS = 8
_SMALL, _LARGE = 2.0**-12, 2.0**20
"""A head's answers where no cap bends them, and where a cap is all that is left of them."""
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class MeasuredHead:
    """What becomes of final hidden states.

    Attributes:
        transform: What the model does besides multiplying by its head's weight, whether before or after it.
        tokens: Logits of each position: rows of the head, without those that pad it.
    """

    transform: LogitTransform
    tokens: int


@torch.no_grad()
def measure_head(model: Any) -> MeasuredHead:
    """Measure multiplier and cap: logits = cap · tanh(multiplier · W h / cap).

    Args:
        model: A causal language model, on the meta device or in memory.

    Raises:
        IncompatiblePairError: It has no head with a weight, or does something else to its states or logits.
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight.ndim != 2:
        raise IncompatiblePairError(f"{name} has no output head with a weight, expected one", _REPORT)
    device = torch.device("cpu") if weight.is_meta else weight.device
    rows, width = weight.shape
    states = _exact(_POSITIONS * width).view(1, _POSITIONS, width).to(device)
    answer = _StandInHead(head, _grid(rows).to(device))
    decoder = find_decoder(model)[0]
    # Wrappers embed the tokens themselves, to put pictures among them.
    tables = [module for module in decoder.modules() if isinstance(module, nn.Embedding)]
    stand_ins: list[tuple[nn.Module, nn.Module]] = [
        (decoder, _StandInDecoder(decoder, states)),
        *((table, _StandInEmbedding(table, device)) for table in tables),
    ]
    stand_ins.append((head, answer))
    try:
        with _replaced(model, stand_ins):
            ids = torch.zeros(1, _POSITIONS, dtype=torch.long, device=device)
            logits = model(input_ids=ids, use_cache=False).logits
    except Exception as error:
        reason = reason_of(error)
        raise IncompatiblePairError(
            f"{name} does something unknown between its decoder and its logits ({reason})", _REPORT
        ) from error
    if len(answer.seen) != 1 or answer.seen[0].shape != states.shape or logits.shape[:-1] != states.shape[:-1]:
        raise IncompatiblePairError(f"{name} does not give its final states to its head, all and once", _REPORT)
    before = _factor(answer.seen[0].float(), states)
    if before is None:
        raise IncompatiblePairError(
            f"{name} does something to its final states before the head that is not known here", _REPORT
        )
    tokens = logits.shape[-1]
    after = _fitted(answer.answer[:tokens], logits.float()) if 2 <= tokens <= rows else None
    if after is None:
        raise IncompatiblePairError(f"{name} does something to its logits that is not known here", _REPORT)
    return MeasuredHead(LogitTransform(_round(before * after.multiplier), after.cap), tokens)


@torch.no_grad()
def check_is_linear(head: Any) -> None:
    """Refuse a head with weights that does not multiply by them.

    Raises:
        IncompatiblePairError: It gives something else than its weight and bias say.
    """
    if type(head) is nn.Linear:
        return
    states = torch.randn(2, head.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(head.weight)
    expected = nn.functional.linear(states, head.weight, getattr(head, "bias", None))
    if not torch.allclose(head(states).float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise IncompatiblePairError(
            f"The head is {type(head).__name__} and does not multiply by its weight, expected Linear", _REPORT
        )


def _exact(count: int) -> Tensor:
    """Numbers that every floating type holds exactly, a few orders of magnitude apart."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(-3, 4, (count,), generator=generator)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return signs * torch.pow(2.0, powers)


def _grid(rows: int) -> Tensor:
    """Answers of a head: one small and one large, then any."""
    grid = torch.randn(rows, generator=torch.Generator().manual_seed(1)) * 30
    grid[: min(2, rows)] = torch.tensor([_SMALL, _LARGE])[:rows]
    return grid


def _factor(found: Tensor, given: Tensor) -> float | None:
    """The one number that ``found`` is ``given`` times, if there is one."""
    factor = float((found / given).median())
    return factor if factor > 0 and torch.allclose(found, factor * given, rtol=_TOLERANCE, atol=0.0) else None


def _fitted(answer: Tensor, logits: Tensor) -> LogitTransform | None:
    """The transform that explains the logits of every position."""
    rows = logits.view(-1, logits.shape[-1])
    slope, largest = float(rows[0, 0]) / _SMALL, float(rows[0, 1])
    if slope <= 0 or largest <= 0:
        return None
    transform = LogitTransform(_round(slope), _round(largest) if largest < 0.5 * slope * _LARGE else None)
    expected = transform(answer).expand_as(rows)
    return transform if torch.allclose(rows, expected, rtol=_TOLERANCE, atol=_TOLERANCE) else None


def _round(value: float) -> float:
    """The number with few digits, or one over it, that a measured one is up to the error of float32."""
    for short in (float(f"{value:.5g}"), 1 / float(f"{1 / value:.5g}")):
        if abs(short - value) <= 3e-7 * abs(value):
            return short
    return value


class _StandInHead(ModuleProxy):
    """Keeps what it is given, and gives the same answer at every position."""

    def __init__(self, original: nn.Module, answer: Tensor) -> None:
        super().__init__(original)
        self.seen: list[Tensor] = []
        object.__setattr__(self, "answer", answer)

    def forward(self, states: Tensor) -> Tensor:
        self.seen.append(states)
        return self.answer.expand(*states.shape[:-1], -1).clone()


class _StandInEmbedding(ModuleProxy):
    """A table of zeros that takes no memory."""

    def __init__(self, original: nn.Embedding, device: torch.device) -> None:
        super().__init__(original)
        object.__setattr__(self, "weight", torch.zeros(1, device=device).expand(original.weight.shape))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight)


class _StandInDecoder(ModuleProxy):
    """A decoder whose final hidden states are known."""

    def __init__(self, original: nn.Module, states: Tensor) -> None:
        super().__init__(original)
        object.__setattr__(self, "states", states)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        from transformers.utils import ModelOutput

        @dataclass
        class Answer(ModelOutput):
            """Everything that a decoder may be asked for besides its states was not computed."""

            last_hidden_state: Any = None

            def __getattr__(self, name: str) -> None:
                if name.startswith("__"):
                    raise AttributeError(name)

        return Answer(last_hidden_state=self.states)


@contextmanager
def _replaced(model: nn.Module, stand_ins: list[tuple[nn.Module, nn.Module]]) -> Iterator[None]:
    """Other modules in the place of some, wherever the model holds them."""
    instead = {id(original): module for original, module in stand_ins}
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if id(child) in instead
    ]
    try:
        for parent, name, child in places:
            setattr(parent, name, instead[id(child)])
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
