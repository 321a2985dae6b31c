"""Gives every tensor of a model its meaning: the join of a checkpoint's names and shapes with the table of roles."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
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
    agreed,
    declared,
    find_faults,
    is_tied,
    text_config,
)
from moe_svd_distill.roles.layout import HEAD_IS_TIED, Geometry, Meaning, ModelLayout, Shape, TensorView
from moe_svd_distill.roles.table import ROLES, Axis

NUMBER = re.compile(r"(?P<list>(?:[^.]+\.)*?[^.]+)\.(?P<layer>\d+)\.(?P<below>.+)")
_FETCH = "Download the model again, or repair config.json"


def read_layout(config: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelLayout:
    """Give every tensor (hub name to shape) its meaning, or the reason why it has none.

    Raises:
        BadDataError: A tensor is missing or a size contradicts config.json; all faults in one line.
    """
    return _Reading(config, shapes).layout()


class _Reading:
    def __init__(self, config: Mapping[str, object], shapes: Mapping[str, Shape]) -> None:
        self.config, self.text, self.shapes = config, text_config(config), shapes
        self.meanings: dict[str, Meaning] = {}
        self.ignored: dict[str, str] = {}
        self.without: dict[str, str] = {}

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
                self.ignored[name] = HEAD_IS_TIED
            elif name in ends:
                self.meanings[name] = Meaning(ends[name], None, None, TensorView(name), self.shapes[name])
            else:
                self.without[name] = table.UNKNOWN
        for layer, names in sorted(inside.items()):
            self._read_layer(layer, names)
        self._set_routers_aside()
        layers_of_rest = {self._layer_of(name) for name in self.without}
        faults = list(find_faults(self.meanings.values(), layers_of_rest, len(inside), self.text))
        like_a_head = any(self.shapes[name] == (vocabulary, self.hidden) for name in self.without)
        if not (tied or "head" in by_role or like_a_head):
            faults.append("no head is stored, and config.json does not tie the embeddings")
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
            match = NUMBER.fullmatch(name)
            path, below = (match["list"], match["below"]) if match else (name, "")
            if reason := table.reason_to_ignore(f"{path}.") or table.reason_to_ignore(f".{below or name}"):
                self.ignored[name] = reason
            elif match:
                lists[path][int(match["layer"])][below] = name
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
            for pattern, found in table.OUTSIDE_LAYERS:
                if re.fullmatch(pattern, name.removeprefix(base)):
                    return found
        head = table.HEAD.fullmatch(name)
        if head and base.startswith(head["path"] or ""):
            return "head"
        if name.endswith(".bias") and (role := self._outside_role(name.removesuffix("bias") + "weight")):
            return f"{role}.bias"
        return None

    def _read_layer(self, layer: int, names: Mapping[str, str]) -> None:
        """Every tensor of a layer; ``names`` is the name below the layer to the hub name."""
        signs = {sign for below in names for sign in table.signs_of(below)}
        for below, name in names.items():
            roles, expert = table.roles_of(below)
            if below.startswith("self_attn.") and "linear attention" in signs:
                self.without[name] = "linear attention has no role"
                continue
            if roles == ("norm.mlp",) and below.startswith("post_") and "norms after" in signs:
                roles = ("norm.attention_output",)
            if not roles:
                self.without[name] = table.reason_without_role(below)
                continue
            found = list(self._parts(roles, name, self.shapes[name], names, signs))
            wrong = next((reason for m in found if (reason := _misfit(m[0], m[2], self.hidden))), None)
            if wrong or not found:
                self.without[name] = (
                    wrong or f"its shape {_words(self.shapes[name])} does not fit {' and '.join(roles)}"
                )
                continue
            for role, view, shape in found:
                number = expert if view.expert is None else view.expert
                self.meanings[view.name] = Meaning(role, layer, number, view, shape)

    def _set_routers_aside(self) -> None:
        """Routers that choose among more than the experts, such as shared ones or none."""
        counts = Counter(m.layer for m in self.meanings.values() if m.role == "experts.down")
        for name, m in list(self.meanings.items()):
            given = (declared(self.text, (key,)) for key in EXPERTS)
            if m.role == "router" and m.shape[0] != counts[m.layer] and m.shape[0] not in given:
                del self.meanings[name]
                self.without[name] = f"a router of {m.shape[0]} rows for {counts[m.layer]} experts"

    def _parts(
        self, roles: tuple[str, ...], name: str, shape: Shape, beside: Mapping[str, str], signs: set[str]
    ) -> Iterator[tuple[str, TensorView, Shape]]:
        """Role, view and shape of everything a tensor holds; nothing if its shape does not fit."""
        if len(shape) == 3 and roles[0].startswith(("dense.", "experts.")) and not roles[0].endswith(".bias"):
            roles = tuple(role.replace("dense.", "experts.") for role in roles)
            transposed = self._is_transposed(beside)
            rows, columns = (shape[2], shape[1]) if transposed else shape[1:]
            interleaved = "interleaved" in signs
            for expert in range(shape[0]):
                yield from _split_rows(
                    roles, TensorView(name, expert, transposed=transposed), rows, columns, interleaved
                )
        elif len(roles) == 1:
            role = "attention.gated_q" if roles == ("attention.q",) and self._is_gated(shape, beside) else roles[0]
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
            shape, roles = self.shapes[name], table.roles_of(below)[0]
            if len(shape) == 3 and shape[1] != shape[2] and roles:
                if roles[-1].endswith((".gate", ".up")):
                    return shape[1] == self.hidden
                if roles[-1].endswith(".down"):
                    return shape[2] == self.hidden
        return False

    def _layer_of(self, name: str) -> int | None:
        match = NUMBER.fullmatch(name)
        return int(match["layer"]) if match and match["list"] == self.list_name else None

    def _head_dimension(self, heads: int) -> int:
        return declared(self.text, ("head_dim",)) or (self.hidden // heads if heads else 0)

    def _geometry(self, layers: int, vocabulary: int, tied: bool) -> Geometry:
        shape = {m.role: m.shape for m in reversed(self.meanings.values())}
        heads = declared(self.text, HEADS)
        experts = Counter(m.layer for m in self.meanings.values() if m.role == "experts.down")
        most = max(experts.values(), default=0)
        return Geometry(
            layers=layers,
            hidden=self.hidden,
            query_heads=heads,
            key_value_heads=declared(self.text, KEY_VALUE_HEADS) or heads,
            head_dimension=self._head_dimension(heads) if "attention.k" in shape else 0,
            vocabulary=vocabulary,
            neurons=shape.get("dense.down", (0, 0))[1],
            experts=most,
            experts_per_token=declared(self.text, PER_TOKEN) or 1 if most else 0,
            expert_neurons=shape.get("experts.down", (0, 0))[1],
            tied_embeddings=tied,
        )


@lru_cache(maxsize=1 << 10)
def _misfit(role: str, shape: Shape, hidden: int) -> str | None:
    """What is wrong with a shape; most axes may have any size."""
    axes = ROLES[role].axes if role in ROLES else ()
    if not axes:
        return None
    fits = len(axes) == len(shape) and all(
        size == hidden for axis, size in zip(axes, shape, strict=True) if axis is Axis.RESIDUAL
    )
    return None if fits else f"its shape {_words(shape)} is not that of {role}, with a width of {hidden}"


def _split_rows(
    roles: tuple[str, ...], whole: TensorView, rows: int, columns: int, interleaved: bool = False
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


def _activation(text: Mapping[str, object]) -> str:
    name = str(text.get("hidden_activation") or text.get("hidden_act") or "")
    return f"{name} clamped at {limit}" if name and (limit := text.get("swiglu_limit")) else name
