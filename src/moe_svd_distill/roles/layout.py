"""A model's tensors, each with its meaning: the join of a checkpoint's names and shapes with the table of roles."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.roles import table
from moe_svd_distill.roles.geometry import (
    EXPERTS,
    HEADS,
    HIDDEN,
    KEY_VALUE_HEADS,
    LAYERS,
    PER_TOKEN,
    VOCABULARY,
    Geometry,
    agreed,
    declared,
    is_tied,
    text_config,
)
from moe_svd_distill.roles.table import ROLES, Axis
from moe_svd_distill.roles.view import TensorView

Shape = tuple[int, ...]
Place = tuple[str, int | None, int | None]

NUMBER = re.compile(r"(?P<list>(?:[^.]+\.)*?[^.]+)\.(?P<layer>\d+)\.(?P<below>.+)")
UNKNOWN = "the table of roles does not have it"
_FETCH = "Download the model again, or repair config.json"
# Where other layers have the second beside the first, a layer without it is not whole.
TOGETHER = (
    *(("attention.q", "attention.o"), ("attention.o", "attention.q"), ("attention.kv_a", "attention.kv_b")),
    *(("dense.up", "dense.down"), ("dense.down", "dense.up"), ("dense.down", "dense.gate")),
    *(("shared.down", "shared.gate"), ("shared.down", "shared.up"), ("experts.down", "router")),
)


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

        Args:
            shapes: Hub name to shape of every tensor.
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


def read_layout(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> ModelLayout:
    """Give every tensor its meaning, or the reason why it has none.

    Args:
        config: The parsed config.json.
        shapes: Hub name to shape.

    Raises:
        BadDataError: A tensor is missing or a size contradicts config.json; all faults in one line.
    """
    return _Reading(config, shapes).layout()


class _Reading:
    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
        self.config, self.text, self.shapes = config, text_config(config), shapes
        self.meanings: dict[str, Meaning] = {}
        self.ignored: dict[str, str] = {}
        self.without: dict[str, str] = {}
        self.candidates: dict[str, list[str]] = {}  # name below a layer to the roles that it may hold

    def layout(self) -> ModelLayout:
        inside, outside = self._split()
        ends = {name: role for name in outside if (role := self._outside_role(name))}
        by_role = {role: self.shapes[name] for name, role in ends.items()}
        embedding, norm = by_role.get("embedding", (0, 0)), by_role.get("norm.final", (0,))
        self.hidden = agreed(self.text, HIDDEN, embedding[-1] or norm[0], "the width of the embeddings is")
        vocabulary = agreed(self.text, VOCABULARY, embedding[0], "the rows of the embeddings are")
        tied = is_tied(self.config, "head" in by_role)
        for name in outside:
            if tied and ends.get(name) == "head":
                self.ignored[name] = "the head is tied to the embeddings"
            elif name in ends:
                self.meanings[name] = Meaning(ends[name], None, None, TensorView(name), self.shapes[name])
            else:
                self.without[name] = UNKNOWN
        for layer, names in sorted(inside.items()):
            for below, name in names.items():
                self._read(layer, below, name, names)
        faults = [] if tied or "head" in by_role else ["no head is stored, and config.json does not tie the embeddings"]
        faults += self._faults(len(inside))
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise BadDataError(faults[0] + more, _FETCH)
        return ModelLayout(
            str(self.text.get("model_type") or self.config.get("model_type")),
            self._geometry(len(inside), vocabulary, tied),
            self.meanings,
            self.ignored,
            self.without,
            _activation(self.text),
        )

    def _split(self) -> tuple[dict[int, dict[str, str]], list[str]]:
        """Layer to name below it to hub name, of the decoder's layers alone; and the names outside all lists."""
        lists: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        outside: list[str] = []
        for name in self.shapes:
            if reason := next((reason for pattern, reason in table.IGNORED if pattern.fullmatch(name)), None):
                self.ignored[name] = reason
            elif match := NUMBER.fullmatch(name):
                lists[match["list"]][int(match["layer"])][match["below"]] = name
            else:
                outside.append(name)
        sizes = {
            path: sum(prod(self.shapes[name]) for names in found.values() for name in names.values())
            for path, found in lists.items()
        }
        self.list_name = max(sizes, key=sizes.__getitem__, default="")
        layers = lists.pop(self.list_name, {})
        for path, found in lists.items():
            self.without |= {n: f"{path} is not the decoder's" for names in found.values() for n in names.values()}
        count = self._layer_count(layers)
        for layer in [layer for layer in layers if layer >= count]:
            reason = f"belongs to a layer beyond the {count} decoder layers (multi-token prediction), not loaded"
            self.ignored |= dict.fromkeys(layers.pop(layer).values(), reason)
        return dict(layers), outside

    def _layer_count(self, layers: Mapping[int, Any]) -> int:
        """As config.json says, or as there are where it counts something else than layers of this list."""
        given = {key: self.text[key] for key in LAYERS if self.text.get(key) is not None}
        found = max(layers, default=-1) + 1
        if found in given.values():
            return found
        for key, value in given.items():
            if type(value) is not int or value < 1:
                raise BadDataError(f"config.json: {key} is {value!r}, expected a positive integer", _FETCH)
            if value < found:
                return value
            raise BadDataError(f"config.json: {key} is {value}, but the weights hold {found} decoder layers", _FETCH)
        return found

    def _outside_role(self, name: str) -> str | None:
        path = self.list_name.rpartition(".")[0]
        base = f"{path}." if path else ""
        if name.startswith(base):
            for pattern, role in table.OUTSIDE_LAYERS:
                if re.fullmatch(pattern, name.removeprefix(base)):
                    return role
        head = table.HEAD.fullmatch(name)
        if head and base.startswith(head["path"] or ""):
            return "head"
        return self._bias_role(name, self._outside_role)

    @staticmethod
    def _bias_role(name: str, role_of: Any) -> str | None:
        """The role of a bias, after the weight that it belongs to."""
        if not name.endswith(".bias"):
            return None
        role: str | None = role_of(name.removesuffix("bias") + "weight")
        return role and f"{role if ' ' not in role else role.partition('.')[0]}.bias"

    def _inside_role(self, below: str) -> str | None:
        for pattern, roles in table.IN_LAYERS:
            if match := pattern.fullmatch(below):
                return match.expand(roles)
        return self._bias_role(below, self._inside_role)

    def _read(self, layer: int, below: str, name: str, beside: Mapping[str, str]) -> None:
        if below not in self.candidates:
            self.candidates[below] = (self._inside_role(below) or "").split()
        roles, shape = self.candidates[below], self.shapes[name]
        if below.startswith("self_attn.") and any(map(table.LINEAR_ATTENTION.fullmatch, beside)):
            self.without[name] = "linear attention has no role"
            return
        if roles == ["norm.mlp"] and below.startswith("post_") and any(map(table.AFTER_ATTENTION.fullmatch, beside)):
            roles = ["norm.attention_output"]
        if not roles:
            self.without[name] = next((why for pattern, why in table.NO_ROLE if pattern.fullmatch(below)), UNKNOWN)
            return
        number = re.search(r"experts\.(\d+)\.", below)
        expert = None if number is None else int(number[1])
        found = list(self._parts(roles, name, shape, beside))
        wrong = next((reason for m in found if (reason := self._misfit(m[0], m[2]))), None)
        if wrong or not found:
            self.without[name] = wrong or f"its shape {_words(shape)} does not fit {' and '.join(roles)}"
            return
        for role, view, size in found:
            self.meanings[view.name] = Meaning(role, layer, expert if view.expert is None else view.expert, view, size)

    def _parts(
        self, roles: list[str], name: str, shape: Shape, beside: Mapping[str, str]
    ) -> Iterator[tuple[str, TensorView, Shape]]:
        """Role, view and shape of everything a tensor holds; nothing if its shape does not fit."""
        if len(shape) == 3 and roles[0].startswith(("dense.", "experts.")) and not roles[0].endswith(".bias"):
            roles = [role.replace("dense.", "experts.") for role in roles]
            transposed = self._is_transposed(beside)
            rows, columns = (shape[2], shape[1]) if transposed else shape[1:]
            interleaved = any(map(table.INTERLEAVED.fullmatch, beside))
            for expert in range(shape[0]):
                yield from _split_rows(
                    roles, TensorView(name, expert, transposed=transposed), rows, columns, interleaved
                )
        elif len(roles) == 1:
            role = "attention.gated_q" if roles == ["attention.q"] and self._is_gated(shape, beside) else roles[0]
            yield role, TensorView(name), shape
        elif len(shape) == 2 and len(roles) == 2:
            yield from _split_rows(roles, TensorView(name), *shape)
        elif len(shape) == 2 and "self_attn.o_proj.weight" in beside:
            queries = self.shapes[beside["self_attn.o_proj.weight"]][-1]
            if (rest := shape[0] - queries) > 0 and rest % 2 == 0:
                starts = zip(roles, (0, queries, queries + rest // 2), (queries, rest // 2, rest // 2), strict=True)
                for role, start, rows in starts:
                    part = role.partition(".")[2]
                    yield role, TensorView(name, part=part, start=start, rows=rows), (rows, shape[1])

    def _is_gated(self, shape: Shape, beside: Mapping[str, str]) -> bool:
        output = beside.get("self_attn.o_proj.weight")
        return (
            output is not None
            and "self_attn.kv_b_proj.weight" not in beside
            and (shape[0] == 2 * self.shapes[output][-1])
        )

    def _is_transposed(self, beside: Mapping[str, str]) -> bool:
        """Whether the experts of a layer, stored as one tensor, are (in, out); a square tensor does not say it."""
        for below, name in beside.items():
            shape, roles = self.shapes[name], self.candidates.get(below) or (self._inside_role(below) or "").split()
            if len(shape) == 3 and shape[1] != shape[2] and roles:
                if roles[-1].endswith((".gate", ".up")):
                    return shape[1] == self.hidden
                if roles[-1].endswith(".down"):
                    return shape[2] == self.hidden
        return False

    def _misfit(self, role: str, shape: Shape) -> str | None:
        """What is wrong with a shape; most axes may have any size."""
        axes = ROLES[role].axes if role in ROLES else ()
        if not axes:
            return None
        fits = len(axes) == len(shape) and all(
            size == self.hidden for axis, size in zip(axes, shape, strict=True) if axis is Axis.RESIDUAL
        )
        return None if fits else f"its shape {_words(shape)} is not that of {role}, with a width of {self.hidden}"

    def _faults(self, layers: int) -> Iterator[str]:
        present: dict[str, set[int]] = defaultdict(set)
        experts: dict[tuple[str, int], set[int]] = defaultdict(set)
        for m in self.meanings.values():
            if m.layer is not None:
                present[m.role].add(m.layer)
                if m.expert is not None:
                    experts[m.role, m.layer].add(m.expert)
        seen = {m.layer for m in self.meanings.values()} | {self._layer_of(name) for name in self.without}
        yield from (f"layer {layer} is missing" for layer in range(layers) if layer not in seen)
        for one, other in TOGETHER:
            if present[one] & present[other]:
                lacking = sorted(present[one] - present[other])
                yield from (f"layer {layer} has no {other}, which other layers have beside {one}" for layer in lacking)
        given = {key: value for key in EXPERTS if type(value := self.text.get(key)) is int}
        rows = {m.layer: m.shape[0] for m in self.meanings.values() if m.role == "router"}
        for layer, count in rows.items():
            if given and count not in given.values():
                key, value = next(iter(given.items()))
                yield f"config.json: {key} is {value}, but the router of layer {layer} has {count} rows"
        for (role, layer), numbers in experts.items():
            most = max(max(found) for (_, where), found in experts.items() if where == layer)
            if missing := sorted(set(range(max(most + 1, rows.get(layer, 0)))) - numbers):
                yield f"layer {layer}: {role} of expert {missing[0]} is missing"

    def _layer_of(self, name: str) -> int | None:
        match = NUMBER.fullmatch(name)
        return int(match["layer"]) if match and match["list"] == self.list_name else None

    def _geometry(self, layers: int, vocabulary: int, tied: bool) -> Geometry:
        shape = {m.role: m.shape for m in reversed(self.meanings.values())}
        heads = declared(self.text, HEADS)
        experts: dict[int | None, int] = defaultdict(int)
        for m in self.meanings.values():
            experts[m.layer] += m.role == "experts.down"
        most = max(experts.values(), default=0)
        return Geometry(
            layers=layers,
            hidden=self.hidden,
            query_heads=heads,
            key_value_heads=declared(self.text, KEY_VALUE_HEADS) or heads,
            head_dimension=declared(self.text, ("head_dim",)) or (self.hidden // heads if heads else 0),
            vocabulary=vocabulary,
            neurons=shape.get("dense.down", (0, 0))[1],
            experts=most,
            experts_per_token=declared(self.text, PER_TOKEN) or 1 if most else 0,
            expert_neurons=shape.get("experts.down", (0, 0))[1],
            tied_embeddings=tied,
        )


def _split_rows(
    roles: list[str], whole: TensorView, rows: int, columns: int, interleaved: bool = False
) -> Iterator[tuple[str, TensorView, Shape]]:
    """The parts of a matrix that holds one or more of equal size, one after the other or with their rows in turn."""
    count, left = divmod(rows, len(roles))
    if left:
        return
    for number, role in enumerate(roles):
        if len(roles) == 1:
            yield role, whole, (rows, columns)
            return
        start, step = (number, len(roles)) if interleaved else (number * count, 1)
        part = role.partition(".")[2]
        view = TensorView(whole.stored, whole.expert, part, whole.transposed, start, step, count)
        yield role, view, (count, columns)


def _words(shape: Shape) -> str:
    return "×".join(map(str, shape))


def _activation(text: Mapping[str, Any]) -> str:
    name = str(text.get("hidden_activation") or text.get("hidden_act") or "")
    return f"{name} clamped at {limit}" if name and (limit := text.get("swiglu_limit")) else name
