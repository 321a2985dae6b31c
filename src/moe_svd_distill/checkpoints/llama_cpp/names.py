"""What llama.cpp calls the tensors of an architecture, and what it changed about their numbers on the way.

The package `gguf` knows the names too, but from many spellings of the hub to one of llama.cpp's; a test holds each
entry here against it. The changes are those of llama.cpp's converters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from moe_svd_distill.checkpoints.quantisation.coded import Arrangement, Part

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_DENSE = {**_ATTENTION, "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_LATENT_ATTENTION = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
_SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}


HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""The tensors whose rows are turned, and the setting that says in how many heads."""


class Share(NamedTuple):
    """What a tensor is of a weight that is made of one or two."""

    hub: str
    part: Part
    arrangement: Arrangement


@dataclass(frozen=True)
class Naming:
    """An architecture's tensors.

    Attributes:
        architecture: llama.cpp's name for it.
        leaves: Name in a layer to that on the hub, both without ``.weight``; ``{}`` is the number of an expert, of whom
            llama.cpp has all in one tensor.
        whole: The same with suffixes, where these differ.
        shares: Name with suffix to what it becomes of a weight, where it is not one by itself.
        turned_heads: Rows of queries and keys lie pair by pair, as llama.cpp's rotary positions want them.
        norms_plus_one: Norm weights have one added.
        without_adapter: What llama.cpp multiplies by without looking for an adapter (`ggml_mul_mat` in its graph
            where others have `build_lora_mm`): tensors of a layer, and the head.
    """

    architecture: str
    leaves: Mapping[str, str]
    whole: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, Share] = field(default_factory=dict)
    turned_heads: bool = False
    norms_plus_one: bool = False
    without_adapter: frozenset[str] = frozenset()


_LATENT = "self_attn.kv_b_proj.weight"
_DEEPSEEK = Naming(
    "deepseek2",
    {**_DENSE, **_LATENT_ATTENTION, **_EXPERTS, **_SHARED_EXPERTS},
    {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias", "exp_probs_b": "mlp.gate.e_score_correction_bias"},
    {"attn_k_b.weight": Share(_LATENT, "codes", "latent"), "attn_v_b.weight": Share(_LATENT, "second", "latent")},
    without_adapter=frozenset({"attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "output"}),
)
_GATE_UP = "mlp.experts.gate_up_proj"

NAMINGS: dict[str, Naming] = {
    "llama": Naming("llama", _DENSE, turned_heads=True),
    "mistral": Naming("llama", _DENSE, turned_heads=True),
    "mixtral": Naming("llama", {**_ATTENTION, **_MIXTRAL}, turned_heads=True),
    "qwen2": Naming("qwen2", _DENSE),
    "qwen2_moe": Naming("qwen2moe", {**_ATTENTION, **_EXPERTS, **_SHARED_EXPERT}),
    "qwen3": Naming("qwen3", {**_DENSE, **_HEAD_NORMS}),
    "qwen3_moe": Naming("qwen3moe", {**_ATTENTION, **_HEAD_NORMS, **_EXPERTS}),
    "gemma3_text": Naming(
        "gemma3",
        {
            **_DENSE,
            **_HEAD_NORMS,
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norms_plus_one=True,
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": Naming(
        "gpt-oss",
        {
            **{name: hub for name, hub in _ATTENTION.items() if name != "ffn_norm"},
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        {
            "attn_sinks.weight": "self_attn.sinks",
            "attn_sinks": "self_attn.sinks",
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        },
        {
            "ffn_gate_exps.weight": Share(_GATE_UP, "codes", "interleaved"),
            "ffn_up_exps.weight": Share(_GATE_UP, "second", "interleaved"),
            "ffn_gate_exps.bias": Share(f"{_GATE_UP}_bias", "codes", "interleaved"),
            "ffn_up_exps.bias": Share(f"{_GATE_UP}_bias", "second", "interleaved"),
            "ffn_down_exps.weight": Share("mlp.experts.down_proj", "codes", "transposed"),
        },
    ),
}
"""By transformers' model type."""

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)|\[\d+\]$")


class Place(NamedTuple):
    """Where llama.cpp has a matrix, or some of its rows.

    Attributes:
        tensor: Its name for the tensor, with suffix.
        expert: Which one of it; None where it is no tensor of experts.
        rows: Which of the matrix's rows (out, in).
        heads: The setting that says in how many heads they are turned; empty where they are not.
    """

    tensor: str
    expert: int | None = None
    rows: slice = slice(None)
    heads: str = ""


def places_of(naming: Naming, matrix: str) -> list[Place]:
    """Where llama.cpp has a matrix of a layer that it looks for an adapter of; empty where there is none.

    Args:
        naming: Of the model's architecture.
        matrix: Its stored name, with the number of an expert in brackets where all are stored in one tensor.
    """
    match = _LAYER.fullmatch(matrix)
    if match is None:
        return []
    layer, hub = f"blk.{match[1]}.", match[2]
    number = _EXPERT.search(hub)
    expert = int(number[0].strip("[]")) if number else None
    if number is not None and number[0].startswith("["):
        shares = {name: share for name, share in naming.shares.items() if share.hub == hub[: number.start()]}
        rows = {"codes": slice(0, None, 2), "second": slice(1, None, 2)}
        return [
            Place(layer + name, expert, rows[share.part] if share.arrangement == "interleaved" else slice(None))
            for name, share in shares.items()
        ]
    known = hub if number is None else f"{hub[: number.start()]}{{}}{hub[number.end() :]}"
    leaf = next((leaf for leaf, name in naming.leaves.items() if f"{name}.weight" == known), None)
    if leaf is None or leaf in naming.without_adapter:
        return []
    heads = HEADS.get(leaf, "") if naming.turned_heads else ""
    return [Place(f"{layer}{leaf}.weight", expert, heads=heads)]
