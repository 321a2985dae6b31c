"""From the tensors of a GGUF file to the weights of the model as the hub has them: each one is accounted for."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from moe_svd_distill.checkpoints.llama_cpp.header import ANOTHER
from moe_svd_distill.checkpoints.llama_cpp.names import HEADS, NAMINGS, OUTSIDE, Share
from moe_svd_distill.checkpoints.quantisation.coded import Arrangement, Coded, Ggml, Part
from moe_svd_distill.checkpoints.quantisation.weights import Weights
from moe_svd_distill.errors import shown
from moe_svd_distill.files.dtypes import FLOATS
from moe_svd_distill.files.header import TensorInfo

ROTARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_IN_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_USE_ANOTHER = "Give a file of another type, or the model's safetensors"


def read_weights(stored: Mapping[str, TensorInfo], config: Mapping[str, object]) -> Weights:
    """The weights that tensors under llama.cpp's names make up, with all that is wrong with them."""
    weights = Weights(stored)
    reading = _Reading(weights, config)
    for info in stored.values():
        reading.take(info)
    reading.join()
    kinds = sorted({info.dtype for info in stored.values()})
    for kind in kinds:
        if kind not in FLOATS and not is_known(kind):
            name = next(info.name for info in stored.values() if info.dtype == kind)
            what = f"tensor {shown(name)} is of type {kind}, which the installed gguf does not turn into numbers"
            weights.fault(what, _USE_ANOTHER)
    weights.quantisation = f"gguf: {', '.join(kinds)}"
    return weights


@cache
def is_known(kind: str) -> bool:
    """Whether the package has the numbers of a type."""
    import gguf
    import numpy as np

    named = gguf.GGMLQuantizationType[kind]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[named][1]), np.uint8), named)
    except NotImplementedError:
        return False
    return True


class _Reading:
    def __init__(self, weights: Weights, config: Mapping[str, object]) -> None:
        self.weights, self.config = weights, dict[str, Any](config)
        self.naming = NAMINGS[self.config["model_type"]]
        self.one_table = bool(config["tie_word_embeddings"]) and "output.weight" in weights.stored
        self.shares: dict[str, dict[Part, tuple[TensorInfo, Share]]] = defaultdict(dict)

    def take(self, info: TensorInfo) -> None:
        """Find the weight that a tensor is, or is part of."""
        match = _IN_LAYER.fullmatch(info.name)
        if self.config["tie_word_embeddings"] and info.name == "output.weight":
            self._add(OUTSIDE["token_embd.weight"], info)
        elif info.name == "token_embd.weight" and self.one_table:
            self.weights.set_aside[info.name] = (
                "the head is the same but for rounding, and serves as the embeddings too"
            )
        elif info.name in OUTSIDE:
            shifted = self.naming.norms_plus_one and info.name == "output_norm.weight"
            self._add(OUTSIDE[info.name], info, "less_one" if shifted else "rows")
        elif info.name in ROTARY:
            self.weights.set_aside[info.name] = "the rotary frequencies of the configuration are made from it"
        elif match is None:
            self._nameless(info)
        elif int(match[1]) >= self.config["num_hidden_layers"]:
            self.weights.set_aside[info.name] = (
                "belongs to a layer that predicts further tokens, and transformers has none"
            )
        else:
            self._in_layer(info, f"model.layers.{int(match[1])}.", match[2])

    def _in_layer(self, info: TensorInfo, layer: str, name: str) -> None:
        naming = self.naming
        leaf, _, suffix = name.rpartition(".")
        if name in naming.whole:
            self._add(layer + naming.whole[name], info)
        elif name in naming.shares:
            share = naming.shares[name]
            self.shares[layer + share.hub][share.part] = (info, share)
        elif leaf not in naming.leaves or suffix not in ("weight", "bias"):
            self._nameless(info)
        elif "{}" in (hub := f"{layer}{naming.leaves[leaf]}.{suffix}"):
            count, size = info.shape[0], info.bytes // info.shape[0]
            for expert in range(count):
                place = info.offset + expert * size
                self._add(hub.format(expert), replace(info, shape=info.shape[1:], bytes=size, offset=place))
        elif naming.turned_heads and leaf in HEADS:
            self._add(hub, info, "turned", self.config[HEADS[leaf]])
        elif naming.norms_plus_one and leaf.endswith("_norm"):
            self._add(hub, info, "less_one")
        else:
            flat = hub.endswith("shared_expert_gate.weight") and len(info.shape) == 1
            self._add(hub, replace(info, shape=(1, *info.shape)) if flat else info)

    def join(self) -> None:
        """Make weights of shares."""
        for hub, parts in self.shares.items():
            expected = {share.part for share in self.naming.shares.values() if hub.endswith(f".{share.hub}")}
            (codes, share), *_ = parts.values()
            if parts.keys() != expected:
                self.weights.fault(f"{shown(codes.name)} lacks what makes it {hub}", _USE_ANOTHER)
                continue
            infos = {part: info for part, (info, _) in parts.items()}
            shape = _joined(share.arrangement, infos)
            if shape is None:
                sizes = " and ".join(f"{shown(info.name)} {list(info.shape)}" for info in infos.values())
                self.weights.fault(f"{sizes} do not make {hub}", _USE_ANOTHER)
                continue
            self._claim(hub, shape, infos, Ggml(share.arrangement))

    def _add(self, hub: str, info: TensorInfo, arrangement: Arrangement = "rows", heads: int = 1) -> None:
        """A weight that is one tensor."""
        if arrangement == "rows" and info.dtype in FLOATS:
            self._note(hub, replace(info, name=hub), info)
        elif arrangement == "turned" and info.shape[0] % (2 * heads):
            what = f"{shown(info.name)} has {info.shape[0]} rows (expected a multiple of twice its {heads} heads)"
            self.weights.fault(what, _USE_ANOTHER)
        else:
            self._claim(hub, info.shape, {"codes": info}, Ggml(arrangement, heads))

    def _claim(self, hub: str, shape: tuple[int, ...], parts: dict[Part, TensorInfo], coding: Ggml) -> None:
        first = next(iter(parts.values()))
        kinds = {info.dtype for info in parts.values()}
        same = kinds <= set(FLOATS) and len(kinds) == 1 and coding.arrangement != "less_one"
        dtype = first.dtype if same else "F32"
        total = sum(info.bytes for info in parts.values())
        info = TensorInfo(hub, shape, dtype, total, first.file, first.offset)
        self.weights.coded[hub] = Coded(info, coding, parts, "+".join(sorted(kinds)))
        for part in parts.values():
            self._note(hub, info, part)

    def _note(self, hub: str, info: TensorInfo, part: TensorInfo) -> None:
        if hub in self.weights.tensors and self.weights.tensors[hub] is not info:
            self.weights.fault(f"{shown(part.name)} and another tensor are both {hub}", _USE_ANOTHER)
        self.weights.tensors[hub] = info
        if hub != part.name:
            self.weights.companions[part.name] = hub

    def _nameless(self, info: TensorInfo) -> None:
        kind = self.config["model_type"]
        what = f"tensor {shown(info.name)} of {shown(info.file)} has no place in {kind} as it is known here"
        self.weights.fault(what, ANOTHER)


def _joined(arrangement: Arrangement, parts: Mapping[Part, TensorInfo]) -> tuple[int, ...] | None:
    """The shape of what parts make together, or None if they do not fit."""
    codes, second = parts["codes"].shape, parts["second"].shape if "second" in parts else ()
    if arrangement == "transposed":
        return (*codes[:-2], codes[-1], codes[-2]) if len(codes) == 3 else None
    if arrangement == "interleaved":
        if codes != second or len(codes) not in (2, 3):
            return None
        return (codes[0], 2 * codes[1]) if len(codes) == 2 else (codes[0], codes[2], 2 * codes[1])
    if len(codes) != 3 or len(second) != 3 or (codes[0], codes[1]) != (second[0], second[2]):
        return None
    return (math.prod((codes[0], codes[2] + second[1])), second[2])
