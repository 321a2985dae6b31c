"""What llama.cpp calls the tensors of an architecture, and what it changed about their numbers on the way.

The package `gguf` knows the names too, but from many spellings of the hub to one of llama.cpp's; a test holds each
entry here against it. The changes are those of llama.cpp's converters.
"""

from __future__ import annotations

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


class Share(NamedTuple):
    """What a tensor is of a weight that is made of one or two."""

    hub: str
    part: Part
    arrangement: Arrangement


@dataclass(frozen=True)
class Naming:
    """An architecture's tensors.

    Attributes:
        leaves: Name in a layer to that on the hub, both without ``.weight``; ``{}`` is the number of an expert, of whom
            llama.cpp has all in one tensor.
        whole: The same with suffixes, where these differ.
        shares: Name with suffix to what it becomes of a weight, where it is not one by itself.
        turned_heads: Rows of queries and keys lie pair by pair, as llama.cpp's rotary positions want them.
        norms_plus_one: Norm weights have one added.
    """

    leaves: Mapping[str, str]
    whole: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, Share] = field(default_factory=dict)
    turned_heads: bool = False
    norms_plus_one: bool = False


_LATENT = "self_attn.kv_b_proj.weight"
_DEEPSEEK = Naming(
    {**_DENSE, **_LATENT_ATTENTION, **_EXPERTS, **_SHARED_EXPERTS},
    {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias", "exp_probs_b": "mlp.gate.e_score_correction_bias"},
    {"attn_k_b.weight": Share(_LATENT, "codes", "latent"), "attn_v_b.weight": Share(_LATENT, "second", "latent")},
)
_GATE_UP = "mlp.experts.gate_up_proj"

NAMINGS: dict[str, Naming] = {
    "llama": Naming(_DENSE, turned_heads=True),
    "mistral": Naming(_DENSE, turned_heads=True),
    "mixtral": Naming({**_ATTENTION, **_MIXTRAL}, turned_heads=True),
    "qwen2": Naming(_DENSE),
    "qwen2_moe": Naming({**_ATTENTION, **_EXPERTS, **_SHARED_EXPERT}),
    "qwen3": Naming({**_DENSE, **_HEAD_NORMS}),
    "qwen3_moe": Naming({**_ATTENTION, **_HEAD_NORMS, **_EXPERTS}),
    "gemma3_text": Naming(
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
