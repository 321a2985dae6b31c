"""What PEFT makes of a model's matrices, asked pair by pair: which keys bring a pair to its parameter.

The hub's names come first, because other programs read them. Where PEFT does not bring such a pair to its parameter,
the parameter gets one pair under PEFT's own name; where that does not arrive either, or PEFT refuses the module, it is
left out and named. Layers of the same make are settled by one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moe_svd_distill.adapter.configuration import peft_configuration
from moe_svd_distill.adapter.keys import AdapterKeys, Factors, Target, expert_factors, planned_tensors
from moe_svd_distill.adapter.peft_model import NAME, LoraTarget, hold_values, load, lora_targets, wrap_student
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.architecture.matrices import Kind, Matrix, never_called
from moe_svd_distill.errors import BadDataError

_RANK = 2
"""Of the pairs that PEFT is asked about."""


def settle_keys(architecture: Architecture) -> AdapterKeys:
    """Ask PEFT about one layer of each make, the head and the embeddings.

    Raises:
        BadDataError: PEFT can wrap nothing of the model.
    """
    candidates = {name: _candidate(name, matrices) for name, matrices in architecture.parameters.items()}
    make_of, asked = _makes(architecture, candidates)
    ends = _embedding_and_head(architecture)
    settled, reasons = _ask(architecture, {name: candidates[name] for name in asked} | ends)
    targets: dict[str, Target] = {}
    left_out: dict[str, str] = dict(architecture.matrices.left_out)
    for name, candidate in {**candidates, **ends}.items():
        model = make_of.get(name, name)
        if model in settled:
            like = settled[model]
            targets[name] = replace(candidate, as_parameter=like.as_parameter, own_keys=like.own_keys)
        else:
            left_out |= dict.fromkeys(candidate.names, reasons[model])
    return AdapterKeys(architecture, targets, left_out)


def _candidate(name: str, matrices: tuple[Matrix, ...]) -> Target:
    as_parameter = matrices[0].kind is not Kind.LINEAR
    own_keys = all(matrix.stored for matrix in matrices)
    return Target(name, tuple(matrix.name for matrix in matrices), matrices, as_parameter, own_keys)


def _embedding_and_head(architecture: Architecture) -> dict[str, Target]:
    head, embedding = architecture.head_slot.name, architecture.embedding_slot.name
    return {
        head: Target(head, (architecture.head,), (), as_parameter=False, own_keys=True),
        embedding: Target(embedding, (architecture.embedding,), (), as_parameter=False, own_keys=True, embedding=True),
    }


def _makes(architecture: Architecture, candidates: Mapping[str, Target]) -> tuple[dict[str, str], list[str]]:
    """Parameter to the one that stands for it, and those that do: layers of like names and shapes are of one make."""
    prefix = architecture.skeleton.prefix
    layers: dict[int, list[Target]] = {}
    for target in candidates.values():
        layers.setdefault(int(target.matrices[0].part), []).append(target)
    first: dict[frozenset[object], int] = {}
    make_of: dict[str, str] = {}
    for layer, targets in sorted(layers.items()):
        tails = {target.parameter.removeprefix(f"{prefix}{layer}."): target for target in targets}
        look = frozenset((tail, target.matrices[0].slot.shape, len(target.names)) for tail, target in tails.items())
        model = first.setdefault(look, layer)
        make_of |= {target.parameter: f"{prefix}{model}.{tail}" for tail, target in tails.items()}
    return make_of, sorted(set(make_of.values()))


class _RandomPairs:
    """A pair of random numbers for every matrix; they are `keys.Pairs`."""

    dtype = torch.float32

    def __init__(self, architecture: Architecture, targets: Iterable[Target]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._factors: dict[str, Factors] = {}
        for target in targets:
            slot = architecture.skeleton.slots[target.parameter]
            shapes = [matrix.shape for matrix in target.matrices] or [(slot.shape[0], slot.shape[1])]
            for name, (rows, columns) in zip(target.names, shapes, strict=True):
                draw = [torch.randn(shape, generator=generator) for shape in ((rows, _RANK), (_RANK, columns))]
                self._factors[name] = draw[0], draw[1]

    def rank(self, name: str) -> int:
        return _RANK

    def factors(self, name: str) -> Factors:
        return self._factors[name]


def _ask(architecture: Architecture, asked: Mapping[str, Target]) -> tuple[dict[str, Target], dict[str, str]]:
    """The parameters that take a pair, and why the others do not."""
    targets, reasons = dict(asked), dict[str, str]()
    pairs = _RandomPairs(architecture, targets.values())

    def leave_out(name: str, reason: str) -> None:
        del targets[name]
        reasons[name] = reason

    def unknown() -> set[str]:
        return set(targets) - {found.parameter for found in lora_targets(_wrapped(architecture, targets.values()))}

    for name in _never_called(architecture, targets):
        leave_out(name, "its module is never called: unmerged, a pair would change nothing")
    for name, reason in _refused(architecture, targets).items():
        leave_out(name, reason)
    for name in unknown():  # linear maps that PEFT takes for experts of older models (peft#3711)
        targets[name] = replace(targets[name], as_parameter=True)
    for name in unknown():
        leave_out(name, "PEFT finds no module or parameter of this name")
    for keys in ("stored names", "PEFT's own names"):
        lost, not_rows = _not_arriving(architecture, targets, pairs)
        for name in not_rows:
            leave_out(name, "PEFT adds its pair to what the embeddings give, not to their rows")
        for name in lost:
            if keys == "stored names" and targets[name].own_keys:
                targets[name] = replace(targets[name], own_keys=False)
            else:
                leave_out(name, "PEFT loses its pair, under the stored name and under its own")
    return targets, reasons


def _never_called(architecture: Architecture, targets: Mapping[str, Target]) -> list[str]:
    """What PEFT puts around a module acts when the module is called."""
    inside = {name: target for name, target in targets.items() if target.matrices}
    layers = 1 + max((int(target.matrices[0].part) for target in inside.values()), default=0)
    silent = never_called(architecture.skeleton, {target.module for target in inside.values()}, layers)
    return [name for name, target in inside.items() if target.module in silent]


def _refused(architecture: Architecture, targets: Mapping[str, Target]) -> dict[str, str]:
    """PEFT refuses some modules by name, such as the output projections of Mamba layers."""
    refused: dict[str, str] = {}
    try:
        _wrapped(architecture, targets.values())
    except BadDataError:
        tails: dict[str, list[str]] = {}
        for name in targets:
            tails.setdefault(".".join(name.split(".")[-2:]), []).append(name)
        for names in tails.values():
            try:
                _wrapped(architecture, [targets[name] for name in names])
            except BadDataError as error:
                refused |= dict.fromkeys(names, error.what)
    return refused


def _not_arriving(
    architecture: Architecture, targets: Mapping[str, Target], pairs: _RandomPairs
) -> tuple[list[str], list[str]]:
    """The parameters whose pairs PEFT does not bring to them as they are meant; and embeddings that it adds wrongly."""
    wrapped = _wrapped(architecture, targets.values())
    found = {target.parameter: target for target in lora_targets(wrapped)}
    modules = {name: target.module for name, target in found.items()}
    planned = planned_tensors(AdapterKeys(architecture, targets, {}), targets.values(), modules, pairs)
    hold_values(wrapped)
    load(wrapped, {key: plan.make().contiguous() for key, plan in planned.items()})
    lost = [name for name, target in targets.items() if not _arrived(target, found[name], pairs)]
    arrived = (name for name, target in targets.items() if target.embedding and name not in lost)
    return lost, [name for name in arrived if not _adds_to_rows(found[name])]


def _arrived(target: Target, found: LoraTarget, pairs: _RandomPairs) -> bool:
    right, left = found.factors
    if right.is_meta or left.is_meta:
        return False
    meant = target.fused(pairs.factors)
    if target.embedding:
        meant = meant[1].T, meant[0].T
    if meant[0].shape != left.shape or meant[1].shape != right.shape:
        return False
    experts = target.matrices[0].experts if target.matrices else 1
    probe = torch.randn(right.shape[1], generator=torch.Generator().manual_seed(1))
    for number in range(experts):
        got, wanted = (expert_factors(*pair, experts, number) for pair in ((left, right), meant))
        if not torch.allclose(got[0] @ (got[1] @ probe), wanted[0] @ (wanted[1] @ probe), rtol=1e-3, atol=1e-3):
            return False
    return True


def _wrapped(architecture: Architecture, targets: Iterable[Target]) -> Any:
    return wrap_student(architecture, peft_configuration(list(targets), lambda name: _RANK), torch.float32)


@torch.no_grad()
def _adds_to_rows(found: LoraTarget) -> bool:
    """Whether embeddings with PEFT's pair around them give what embeddings with changed rows give, on a few rows.

    Not so where an architecture does something to the rows that are looked up, such as normalising them.
    """
    generator = torch.Generator().manual_seed(0)
    layer, rows = found.layer, 4
    base = layer.get_base_layer()
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shape = (rows, layer.out_features) if module is base and name == "weight" else parameter.shape
                value = torch.randn(shape, generator=generator)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.full(buffer.shape, 2.0).to(buffer.dtype)
    base.padding_idx = None
    factors = [torch.randn(shape, generator=generator) for shape in ((_RANK, rows), (layer.out_features, _RANK))]
    for holder, factor in zip((layer.lora_embedding_A, layer.lora_embedding_B), factors, strict=True):
        holder[NAME] = nn.Parameter(factor, requires_grad=False)
    ids = torch.arange(rows)
    got = layer(ids)
    base.weight.add_((factors[1] @ factors[0]).T * found.scale)
    return bool(torch.allclose(got, base(ids), rtol=1e-3, atol=1e-3))
