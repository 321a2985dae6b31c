"""Whether the weights of a model are all there, by what its layers have in common and by config.json."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moe_svd_distill.roles.geometry import EXPERTS
from moe_svd_distill.roles.layout import Meaning

# Where other layers have the second beside the first, a layer without it is not whole.
TOGETHER = (
    *(("attention.q", "attention.o"), ("attention.o", "attention.q"), ("attention.kv_a", "attention.kv_b")),
    *(("dense.up", "dense.down"), ("dense.down", "dense.up"), ("dense.down", "dense.gate")),
    *(("shared.down", "shared.gate"), ("shared.down", "shared.up"), ("experts.down", "router")),
)


def find_faults(
    meanings: Collection[Meaning], others: Collection[int | None], layers: int, text: Mapping[str, Any]
) -> Iterator[str]:
    """What is missing, or contradicts the number of experts.

    Args:
        meanings: Everything with a role.
        others: Layers that have a tensor without one.
        layers: How many there must be.
        text: What config.json says of the text model.
    """
    present: dict[str, set[int]] = defaultdict(set)
    experts: dict[int, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    rows: dict[int, int] = {}
    for m in meanings:
        if m.layer is not None:
            present[m.role].add(m.layer)
            if m.expert is not None:
                experts[m.layer][m.role].add(m.expert)
            if m.role == "router":
                rows[m.layer] = m.shape[0]
    seen = set(others).union(*present.values())
    yield from (f"layer {layer} is missing" for layer in range(layers) if layer not in seen)
    for one, other in TOGETHER:
        if present[one] & present[other]:
            lacking = sorted(present[one] - present[other])
            yield from (f"layer {layer} has no {other}, which other layers have beside {one}" for layer in lacking)
    given = {key: value for key in EXPERTS if type(value := text.get(key)) is int}
    for layer in sorted(present["experts.down"]):
        count = max(experts[layer]["experts.down"]) + 1
        if given and count not in given.values():
            if rows.get(layer) not in given.values():
                key, value = next(iter(given.items()))
                yield f"config.json: {key} is {value}, but layer {layer} has {count} experts"
            count = max(count, rows.get(layer, 0))
        for role, found in experts[layer].items():
            if left := set(range(count)) - found:
                yield f"layer {layer}: {role} of expert {min(left)} is missing"
