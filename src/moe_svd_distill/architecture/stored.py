"""Which tensors of a checkpoint make which tensors in memory, settled from the headers before anything is read.

The names and the operations are transformers' own (`conversion_mapping`, `core_model_loading`). Experts that are stored
one by one and held fused are copied one by one into their place; any other operation is left to transformers.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe_svd_distill.architecture.skeleton import EMBEDDING, ENDS, OUTSIDE, ParameterSlot, Part, Skeleton
from moe_svd_distill.checkpoints import Checkpoint, TensorInfo
from moe_svd_distill.errors import BadDataError, reason_of
from moe_svd_distill.roles.table import RECOMPUTED

_FETCH = "Fetch the model again, or report the architecture to the project"


@dataclass(frozen=True)
class StoredSlice:
    """A stored tensor that goes into its place as it is: at ``[index]``, in the range from ``begin`` along ``dim``."""

    hub_name: str
    index: int | None = None
    dim: int = 0
    begin: int | None = None
    length: int = 0

    def within(self, whole: Tensor) -> Tensor:
        """The region of the parameter, as a view."""
        region = whole if self.index is None else whole[self.index]
        return region if self.begin is None else region.narrow(self.dim, self.begin, self.length)


@dataclass(frozen=True, eq=False)
class TensorSource:
    """What one or more parameters are made from: pieces, or an operation of transformers.

    Attributes:
        slots: What is made.
        hub_names: Stored tensors it takes, in order, each with the pattern that `converter` finds it by.
        pieces: How to copy them in; empty where `converter` does it.
        converter: transformers' operation.
        first_name: The name that transformers gives the result first.
    """

    slots: tuple[ParameterSlot, ...]
    hub_names: Mapping[str, str]
    pieces: tuple[StoredSlice, ...] = ()
    converter: Any = None
    first_name: str = ""

    def convert(self, tensors: Iterable[Tensor], names: Any) -> dict[str, Tensor]:
        """Let transformers make the slots' tensors, by name, from the stored ones in the order of `hub_names`."""
        converter = copy.deepcopy(self.converter)
        for (hub_name, pattern), tensor in zip(self.hub_names.items(), tensors, strict=True):
            converter.add_tensor(self.first_name, hub_name, pattern, tensor)
        made = converter.convert(self.first_name, model=names, config=names.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def restore(self, made: Mapping[str, Tensor], names: Any) -> dict[str, Tensor]:
        """The stored tensors that `convert` makes these of: the values of every slot in the checkpoint's arrangement.

        Raises:
            BadDataError: transformers' operation cannot be undone.
        """
        reverse = copy.deepcopy(self.converter).reverse_transform()
        tensors: dict[str, Any] = {
            pattern: [made[slot.name]] for pattern, slot in zip(reverse.source_patterns, self.slots, strict=False)
        }
        order = {pattern: place for place, pattern in enumerate(self.converter.source_patterns)}
        hub_names = sorted(self.hub_names, key=lambda name: order.get(self.hub_names[name], 0))
        try:
            for operation in reverse.operations:
                tensors = operation.convert(
                    tensors,
                    source_patterns=reverse.source_patterns,
                    target_patterns=reverse.target_patterns,
                    full_layer_name=self.first_name,
                    model=names,
                    config=names.config,
                )
            found = [value[0] if isinstance(value, list) else value for value in tensors.values()]
            stored = dict(zip(hub_names, found, strict=True))
            again = self.convert((stored[name] for name in self.hub_names), names)
        except Exception as error:
            raise BadDataError(
                f"transformers cannot undo how it makes {self.first_name}: {reason_of(error)}",
                "Load the adapter with PEFT instead",
            ) from error
        if not all(torch.equal(again[name], value) for name, value in made.items()):
            raise BadDataError(
                f"transformers does not undo how it makes {self.first_name}", "Load the adapter with PEFT instead"
            )
        return stored


class CheckpointMap:
    """The sources of every part.

    Attributes:
        checkpoint: Where they are stored.
        skeleton: What is made of them.
        of_part: Part to its sources.
        unused: Stored tensors that have no place in the model, or none in its decoder or head.
        names: What transformers' operations may ask a model for.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton) -> None:
        self.checkpoint, self.skeleton = checkpoint, skeleton
        self.names = SimpleNamespace(
            config=skeleton.model.config,
            get_parameter=lambda name: torch.empty(skeleton.slots[name].shape, device="meta"),
        )
        self.of_part: dict[Part, list[TensorSource]] = defaultdict(list)
        unused: list[str] = []
        filled: dict[str, TensorSource] = {}
        for source in self._sources(unused):
            part = self._only_part(source)
            if part == OUTSIDE:
                unused += source.hub_names
                continue
            self.of_part[part].append(source)
            filled |= {slot.name: source for slot in source.slots}
        self.unused = tuple(sorted(unused))
        self._fill_tied(filled)

    def bytes_of(self, part: Part) -> int:
        """Stored bytes of a part."""
        return sum(self.checkpoint[name].bytes for source in self.of_part[part] for name in source.hub_names)

    def decoder_bytes(self) -> int:
        """Stored bytes of everything between token ids and final hidden states."""
        return sum(self.bytes_of(part) for part in (EMBEDDING, ENDS, *range(len(self.skeleton.originals))))

    def _sources(self, unused: list[str]) -> list[TensorSource]:
        ignored = _ignored(self.skeleton.model)
        gathered: dict[str, tuple[Any, dict[str, str]]] = {}
        for hub_name, name, pattern, converter in in_memory(self.skeleton, self.checkpoint):
            if name not in self.skeleton.slots:
                self._refuse_left_over(hub_name, name, ignored)
                unused.append(hub_name)
                continue
            gathered.setdefault(name, (converter, {}))[1][hub_name] = pattern
        return [self._source(name, converter, taken) for name, (converter, taken) in gathered.items()]

    def _refuse_left_over(self, hub_name: str, name: str, ignored: re.Pattern[str]) -> None:
        """What a decoder layer has and the model does not would be lost silently."""
        part = self.skeleton.part_of_name(name)
        inside = isinstance(part, int) and part < len(self.skeleton.originals)
        known = any(RECOMPUTED.fullmatch(each) or ignored.search(each) for each in (hub_name, name))
        if inside and not known and name not in self.skeleton.recomputed:
            raise self._bad(f"tensor {hub_name} has no place in {type(self.skeleton.model).__name__}")

    def _source(self, name: str, converter: Any, taken: Mapping[str, str]) -> TensorSource:
        slot = self.skeleton.slots[name]
        infos, first = [self.checkpoint[hub_name] for hub_name in taken], next(iter(taken))
        if converter is None:
            if len(taken) > 1:
                both = " and ".join(list(taken)[:2])
                raise self._bad(f"{both} are both {name} in memory")
            self._check_shape(name, infos[0].shape, slot.shape)
            return TensorSource((slot,), taken, (StoredSlice(first),))
        pieces = _pieces(converter, taken, infos, slot.shape)
        if pieces is not None:
            return TensorSource((slot,), taken, pieces)
        if missing := _missing_expert(converter, taken, slot.shape):
            raise self._bad(f"{missing} is missing, {name} needs it")
        trial = TensorSource((), taken, converter=converter, first_name=name)
        try:
            made = trial.convert((torch.empty(info.shape, device="meta") for info in infos), self.names)
        except Exception as error:
            raise self._bad(f"transformers cannot make {name} from {first}: {reason_of(error)}") from error
        for made_name, tensor in made.items():
            if made_name not in self.skeleton.slots:
                raise self._bad(f"{made_name} has no place in the model")
            self._check_shape(made_name, tuple(tensor.shape), self.skeleton.slots[made_name].shape)
        targets = tuple(self.skeleton.slots[made_name] for made_name in made)
        return TensorSource(targets, taken, converter=converter, first_name=name)

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(found) != expected:
            sizes = ["×".join(map(str, shape)) for shape in (found, expected)]
            raise self._bad(f"{name} is {sizes[0]}, the config needs {sizes[1]}")

    def _bad(self, what: str) -> BadDataError:
        return BadDataError(f"{self.checkpoint.title}: {what}", _FETCH)

    def _only_part(self, source: TensorSource) -> Part:
        parts = {slot.part for slot in source.slots}
        if len(parts) > 1:
            raise self._bad(f"{next(iter(source.hub_names))} holds weights of several layers")
        return parts.pop()

    def _fill_tied(self, filled: Mapping[str, TensorSource]) -> None:
        """Give a parameter that is tied to another one the other's tensor; refuse what is missing after that."""
        tied: dict[str, str] = getattr(self.skeleton.model, "all_tied_weights_keys", None) or {}
        for name, slot in self.skeleton.slots.items():
            if name in filled or slot.part == OUTSIDE:
                continue
            root = tied.get(name, name)
            partners = [root, *(target for target, source in tied.items() if source == root)]
            partner = next((other for other in partners if other in filled), None) if name in {root, *tied} else None
            if partner is None:
                raise self._bad(f"{name} is missing")
            source = filled[partner]
            if not source.pieces:
                raise self._bad(f"{name} is tied to a converted tensor")
            self.of_part[slot.part].append(TensorSource((slot,), source.hub_names, source.pieces))


def in_memory(skeleton: Skeleton, hub_names: Iterable[str]) -> Iterator[tuple[str, str, str, Any]]:
    """Every stored name, in the order that transformers takes them, with what becomes of it.

    Yields:
        Stored name, name in memory (of the first result, where an operation makes several), the pattern that an
        operation found it by (the stored name itself without one), and the operation or None.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    whole = skeleton.whole or skeleton
    prefix = whole.model.base_model_prefix
    renamings = [rule for rule in whole.rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in whole.rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = dict.fromkeys(whole.slots, True)
    for hub_name in sorted(hub_names, key=dot_natural_key):
        name, pattern = rename_source_key(hub_name, renamings, converters, prefix, known)
        if name not in known and hub_name in known:
            name, pattern = rename_source_key(hub_name, [], [], prefix, known)
        yield hub_name, skeleton.name_of(name), pattern or hub_name, None if pattern is None else of_pattern[pattern]


def _ignored(model: Any) -> re.Pattern[str]:
    """What transformers leaves out of a checkpoint on purpose, such as layers for multi-token prediction."""
    own = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return re.compile("|".join(f"({pattern})" for pattern in own) or r"(?!)")


def _pieces(
    converter: Any, taken: Mapping[str, str], infos: list[TensorInfo], shape: tuple[int, ...]
) -> tuple[StoredSlice, ...] | None:
    """How to copy experts stored one by one into their fused tensor, if that is all the operation does."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    operations = converter.operations
    if not operations or type(operations[0]) is not MergeModulelist or operations[0].dim != 0:
        return None
    patterns: list[str] = list(converter.source_patterns)
    if len(operations) == 1 and len(patterns) == 1:
        dim = None
    elif len(operations) == 2 and type(operations[1]) is Concatenate and operations[1].dim in range(1, len(shape)):
        dim = operations[1].dim - 1
    else:
        return None
    experts: dict[str, dict[str, TensorInfo]] = {pattern: {} for pattern in patterns}
    for (hub_name, pattern), info in zip(taken.items(), infos, strict=True):
        experts[pattern][hub_name] = info
    pieces, begin = [], 0
    for pattern in patterns:
        sizes = {tuple(info.shape) for info in experts[pattern].values()}
        if len(experts[pattern]) != shape[0] or len(sizes) != 1:
            return None
        size, numbered = sizes.pop(), enumerate(experts[pattern])
        if dim is None:
            pieces += [StoredSlice(hub_name, index) for index, hub_name in numbered]
            complete = size == shape[1:]
        else:
            pieces += [StoredSlice(hub_name, index, dim, begin, size[dim]) for index, hub_name in numbered]
            begin += size[dim]
            complete = (*size[:dim], *size[dim + 1 :]) == (*shape[1 : dim + 1], *shape[dim + 2 :])
        if not complete:
            return None
    return tuple(pieces) if dim is None or begin == shape[dim + 1] else None


def _missing_expert(converter: Any, taken: Iterable[str], shape: tuple[int, ...]) -> str | None:
    """The name of an expert's tensor that is not there, where experts are gathered into one tensor."""
    from transformers.core_model_loading import MergeModulelist

    if not converter.operations or type(converter.operations[0]) is not MergeModulelist:
        return None
    numbered = [re.fullmatch(r"(.*\.)(\d+)(\..*)", hub_name) for hub_name in taken]
    found = {(match[1], int(match[2]), match[3]) for match in numbered if match}
    ends = sorted({(begin, end) for begin, _, end in found})
    expected = ((begin, number, end) for begin, end in ends for number in range(shape[0]))
    return next((f"{begin}{number}{end}" for begin, number, end in expected if (begin, number, end) not in found), None)
