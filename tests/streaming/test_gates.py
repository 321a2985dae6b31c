"""Gates in place of layers: what is carried is found, and what cannot be carried is refused by name."""

from __future__ import annotations

import json
import weakref
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.streaming.carried import changed, flatten, put, unflatten
from moe_svd_distill.streaming.gates import GatedDecoder
from moe_svd_distill.streaming.layout import GateLayout

CPU = torch.device("cpu")
LAYERS, WIDTH, LENGTH = 4, 6, 5
IDS = torch.randint(0, 20, (3, LENGTH), generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """Mixes the hidden states with whatever else it is given."""

    def __init__(self, number: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator), requires_grad=False)
        self.number = number

    def forward(self, hidden: Tensor, more: Tensor | None = None, box: Any = None) -> Tensor:
        result = torch.tanh(hidden @ self.weight)
        if box is not None:
            result = result + sum(box.values(), torch.zeros(()))
            box[f"layer {self.number}"] = result[:, -1:] * 0.1
        return result if more is None else result + more


Between = Callable[[nn.ModuleList, Tensor], Tensor]


class Toy(nn.Module):
    """A decoder that does what it is told around its layers."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList(Layer(number) for number in range(LAYERS))
        self.between = between

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(last_hidden_state=self.between(self.layers, self.embed(input_ids)))


def plain(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden)
    return hidden


def with_container(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    box: UserDict[str, Tensor] = UserDict()
    for layer in layers:
        hidden = layer(hidden, box=box)
    return hidden


def with_tokens(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    """Every layer is given the embeddings again, and sequences behind the first dimension."""
    first = hidden
    for layer in layers:
        hidden = layer(hidden.transpose(0, 1), more=first.transpose(0, 1)).transpose(0, 1)
    return hidden


def out_of_order(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for number in (0, 2, 1, 3):
        hidden = layers[number](hidden)
    return hidden


def without_the_last(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers[:-1]:  # type: ignore[union-attr]
        hidden = layer(hidden)
    return hidden


def with_a_mean_over_the_batch(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden, more=hidden.mean((0, 1)))
    return hidden


def with_a_memory_of_its_own(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    outputs: list[Tensor] = []
    for layer in layers:
        hidden = layer(hidden + sum(outputs[:-1], torch.zeros(())))
        outputs.append(hidden)
    return hidden


def gated(between: Between) -> tuple[Toy, GatedDecoder]:
    toy = Toy(between)
    decoder = GatedDecoder(SimpleNamespace(decoder=toy, originals=tuple(toy.layers)), CPU)  # type: ignore[arg-type]
    decoder.layers = dict(enumerate(toy.layers))
    return toy, decoder


@pytest.mark.parametrize("between", [plain, with_container, with_tokens])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_layer_after_layer_gives_what_the_decoder_gives(between: Between, cut: int) -> None:
    """In batches of two and one to the cut, in another process's place and other batches from there."""
    toy, decoder = gated(between)
    layout, batches = GateLayout("Toy", LAYERS), [slice(0, 2), slice(2, 3)]
    recorded: list[list[Tensor]] = [[], []]
    for index in range(cut):
        recorded = [
            layout.step(decoder, IDS[rows], index, given, learn=rows.start == 0)
            for rows, given in zip(batches, recorded, strict=True)
        ]
    packed = torch.cat([layout.gate(cut).pack(each) for each in recorded])
    later = GateLayout("Toy", LAYERS)
    later.decode(cut, json.loads(json.dumps(layout.encode(cut))))
    for rows in (slice(0, 1), slice(1, 3)):
        found = later.states(decoder, IDS[rows], cut, later.gate(cut).unpack(packed[rows]))
        torch.testing.assert_close(found, toy(IDS[rows], use_cache=False).last_hidden_state)


def test_what_follows_from_the_tokens_is_not_carried() -> None:
    _, decoder = gated(with_tokens)
    layout = GateLayout("Toy", LAYERS)
    (hidden,) = layout.step(decoder, IDS, 0, [], learn=True)
    assert layout.gate(1).paths == ((0, 0),)
    assert hidden.shape == (3, 1, LENGTH, WIDTH)  # sequence by sequence, though they are the second dimension there


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (out_of_order, "Toy runs layer 2 where 1 was expected"),
        (without_the_last, "Toy runs 3 of its 4 layers"),
        (with_a_mean_over_the_batch, r"Toy gives layer 1 values of shape \(6,\) that belong to no sequence"),
        (with_a_memory_of_its_own, "Toy keeps outputs of layers to itself and uses them behind layer 1"),
    ],
)
def test_what_cannot_be_carried_is_refused(between: Between, message: str) -> None:
    _, decoder = gated(between)
    layout, given = GateLayout("Toy", LAYERS), []
    with pytest.raises(IncompatiblePairError, match=message):  # noqa: PT012
        for index in range(LAYERS - 1):
            given = layout.step(decoder, IDS, index, given, learn=True)
        layout.states(decoder, IDS, LAYERS - 1, given)


def test_placeholders_take_no_memory() -> None:
    """Those of all layers before the one that runs would otherwise be as large as a layer or larger."""
    _, decoder = gated(plain)
    layout = GateLayout("Toy", LAYERS)
    given = layout.step(decoder, IDS, 0, [], learn=True)
    layout.step(decoder, IDS, 1, given, learn=True)
    value = layout._placeholder(torch.zeros(1000, LENGTH))(0)
    assert value.shape == (1000, LENGTH, WIDTH)
    assert value.untyped_storage().nbytes() == 4


def test_a_batch_leaves_nothing_behind() -> None:
    toy, decoder = gated(plain)
    seen: list[weakref.ref[Tensor]] = []
    for layer in toy.layers:
        layer.register_forward_hook(lambda _, given, output: seen.extend(map(weakref.ref, (*given, output))))
    layout = GateLayout("Toy", LAYERS)
    layout.step(decoder, IDS, 1, layout.step(decoder, IDS, 0, [], learn=True), learn=True)
    assert len(seen) >= 4
    assert not any(each() is not None for each in seen)


def test_trees() -> None:
    tree = ((torch.zeros(2), 3), {"a": [torch.ones(1), None], 4: "x"})
    form, tensors = flatten(tree)
    again = unflatten(json.loads(json.dumps(form)), iter(tensors))
    assert not list(changed(again, (tree, tree)))
    other = ((torch.zeros(2), 4), {"a": [torch.zeros(1), None], 4: "x"})
    assert list(changed(tree, (tree, other))) == [(0, 1), (1, "a", 0)]
    box = UserDict({"old": 1})
    placed = put((1, box, 2), (1,), {"new": 3})
    assert placed[1] is box
    assert box == {"new": 3}
    with pytest.raises(IncompatiblePairError, match="returns a object"):
        flatten(object())
