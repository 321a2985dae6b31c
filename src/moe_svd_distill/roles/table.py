"""The one table of roles: what a tensor means, by its hub name, for every architecture.

Names are given below the decoder layer. To teach the weights stage another architecture is to add its names here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache


class Axis(StrEnum):
    """What the rows or the columns of a tensor are indexed by."""

    RESIDUAL = "residual"
    QUERY_HEADS = "query heads"
    KEY_VALUE_HEADS = "key-value heads"
    HEAD_DIMENSION = "head dimension"
    LATENT = "latent"
    NEURONS = "neurons"
    EXPERTS = "experts"
    VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class Role:
    """What a tensor does.

    Attributes:
        axes: What its rows and columns are; a role with two is a matrix, and can be changed.
        norms: Roles of the norms that may feed it; the first that its layer has does.
    """

    axes: tuple[Axis, ...]
    norms: tuple[str, ...] = ()

    @property
    def is_matrix(self) -> bool:
        """Whether the weights stage can change it."""
        return len(self.axes) == 2


_R, _Q, _KV, _N, _E = Axis.RESIDUAL, Axis.QUERY_HEADS, Axis.KEY_VALUE_HEADS, Axis.NEURONS, Axis.EXPERTS
_L, _D, _V = Axis.LATENT, Axis.HEAD_DIMENSION, Axis.VOCABULARY
_ATTENTION, _MLP = ("norm.attention",), ("norm.mlp",)
_EXPERTS = ("norm.experts", *_MLP)

ROLES: dict[str, Role] = {
    "embedding": Role((_V, _R)),
    "norm.final": Role((_R,)),
    "head": Role((_V, _R), ("norm.final",)),
    "norm.attention": Role((_R,)),
    "norm.attention_output": Role((_R,)),
    "norm.mlp": Role((_R,)),
    "norm.mlp_output": Role((_R,)),
    "norm.experts": Role((_R,)),
    "norm.router": Role((_R,)),
    "attention.q": Role((_Q, _R), _ATTENTION),
    "attention.k": Role((_KV, _R), _ATTENTION),
    "attention.v": Role((_KV, _R), _ATTENTION),
    "attention.o": Role((_R, _Q)),
    "attention.q_norm": Role((_D,)),
    "attention.k_norm": Role((_D,)),
    "attention.gated_q": Role((_Q, _R), _ATTENTION),  # of each head the query, then a gate on its output
    "attention.q_a": Role((_L, _R), _ATTENTION),
    "attention.q_a_norm": Role((_L,)),
    "attention.q_b": Role((_Q, _L), ("attention.q_a_norm",)),
    "attention.kv_a": Role((_L, _R), _ATTENTION),
    "attention.kv_a_norm": Role((_L,)),
    "attention.kv_b": Role((_KV, _L), ("attention.kv_a_norm",)),
    "dense.gate": Role((_N, _R), _MLP),
    "dense.up": Role((_N, _R), _MLP),
    "dense.down": Role((_R, _N)),
    "shared.gate": Role((_N, _R), _MLP),
    "shared.up": Role((_N, _R), _MLP),
    "shared.down": Role((_R, _N)),
    "shared.expert_gate": Role((_E, _R), _MLP),
    "router": Role((_E, _R), ("norm.router", *_EXPERTS)),
    "experts.gate": Role((_N, _R), _EXPERTS),
    "experts.up": Role((_N, _R), _EXPERTS),
    "experts.down": Role((_R, _N)),
}
"""Every role that has a meaning across architectures; biases and other vectors are called after what they belong to."""

OUTSIDE_LAYERS = (
    (r"(embed_tokens|wte|embed_in|tok_embeddings|word_embeddings|embeddings|embed)\.weight", "embedding"),
    (r"(norm|norm_f|ln_f|final_layernorm|final_layer_norm|embedding_norm)\.weight", "norm.final"),
)
"""Beside the list of layers."""
HEAD = re.compile(r"(?P<path>.*\.)?(?:lm_head|embed_out|head|output)\.weight")
"""The head, at the decoder or above it."""

_WORDS = {
    "mlp": r"(?:mlp|feed_forward|block_sparse_moe|ffn|moe)\.",
    "shared": r"(?:shared_experts?|shared_mlp|share_expert)\.",
    "gate": r"(?:gate_proj|w1)",
    "up": r"(?:up_proj|w3)",
    "down": r"(?:down_proj|w2|output_linear)",
    "both": r"(?:gate_up_proj|input_linear)",
}
_IN_LAYERS: tuple[tuple[str, str], ...] = (
    (r"(?:input_layernorm|attention_norm|attn_norm|operator_norm)\.weight", "norm.attention"),
    (r"post_attention_layernorm\.weight", "norm.mlp"),  # or of attention's output: see `SIGNS`
    (r"(?:pre_feedforward_layernorm|pre_mlp_layernorm|pre_ff_layernorm|ffn_norm|mlp_norm)\.weight", "norm.mlp"),
    (r"(?:post_feedforward_layernorm|post_mlp_layernorm|post_ffn_norm)\.weight", "norm.mlp_output"),
    (r"(?:post_self_attn_layernorm|post_attn_norm|post_operator_norm)\.weight", "norm.attention_output"),
    (r"pre_feedforward_layernorm_2\.weight", "norm.experts"),
    (r"post_feedforward_layernorm_1\.weight", "norm.dense_output"),
    (r"post_feedforward_layernorm_2\.weight", "norm.experts_output"),
    (r"router\.scale", "norm.router"),
    (r"self_attn\.(?P<side>[qkvo])_proj\.weight", r"attention.\g<side>"),
    (r"self_attn\.qkv_proj\.weight", "attention.q attention.k attention.v"),
    (r"self_attn\.(?P<side>[qk])(?:uery|ey)?_(?:layer)?norm\.weight", r"attention.\g<side>_norm"),
    (r"self_attn\.(?P<side>q_a|q_b|kv_b)_proj\.weight", r"attention.\g<side>"),
    (r"self_attn\.kv_a_proj_with_mqa\.weight", "attention.kv_a"),
    (r"self_attn\.(?P<side>q_a|kv_a)_layernorm\.weight", r"attention.\g<side>_norm"),
    (r"self_attn\.sinks", "attention.sinks"),
    (r"{mlp}{gate}\.weight", "dense.gate"),  # with three dimensions, of experts: see `reading`
    (r"{mlp}{up}\.weight", "dense.up"),
    (r"{mlp}{down}\.weight", "dense.down"),
    (r"{mlp}{both}\.weight", "dense.gate dense.up"),
    (r"(?:{mlp})?{shared}{gate}\.weight", "shared.gate"),
    (r"(?:{mlp})?{shared}{up}\.weight", "shared.up"),
    (r"(?:{mlp})?{shared}{down}\.weight", "shared.down"),
    (r"(?:{mlp})?{shared}{both}\.weight", "shared.gate shared.up"),
    (r"(?:{mlp})?shared_expert_gate\.weight", "shared.expert_gate"),
    (r"(?:{mlp})?(?:gate|router|gate\.wg|router\.gate|router\.layer|router\.proj)\.weight", "router"),
    (
        r"(?:{mlp})?(?:gate\.|router\.|experts\.|moe_statics\.)?(?:e_score_correction_bias|expert_bias|router_bias)",
        "router.correction_bias",
    ),
    (r"(?:{mlp})?experts\.(?P<expert>\d+)\.{gate}\.weight", "experts.gate"),
    (r"(?:{mlp})?experts\.(?P<expert>\d+)\.{up}\.weight", "experts.up"),
    (r"(?:{mlp})?experts\.(?P<expert>\d+)\.{down}\.weight", "experts.down"),
    (r"(?:{mlp})?experts\.{both}(?:\.weight)?", "experts.gate experts.up"),
    (r"(?:{mlp})?experts\.{down}(?:\.weight)?", "experts.down"),
    (r"(?:{mlp})?experts\.{both}_bias", "experts.gate_up.bias"),
    (r"(?:{mlp})?experts\.{down}_bias", "experts.down.bias"),
)
IN_LAYERS = tuple((re.compile(re.sub(r"\{(\w+)\}", lambda m: _WORDS.get(m[1], m[0]), p)), r) for p, r in _IN_LAYERS)
"""Pattern of a name below its layer to the role, or the roles one after the other, of what it holds."""

SIGNS = {
    # post_attention_layernorm is applied to what attention puts out, and nothing reads it
    "norms after": re.compile(r"(?:pre_feedforward|pre_mlp|post_feedforward)_layernorm\.weight"),
    # rows of gate and up take turns (gpt-oss)
    "interleaved": re.compile(r".*\.gate_up_proj_bias"),
    # self_attn is not softmax attention
    "linear attention": re.compile(
        r"self_attn\.(?:A_log|(?:[qk]_)?conv1d\.weight|output_gate\.weight|slope_rate|forget_gate\..*)"
    ),
}
"""Names that say of the others in their layer what those do not say themselves."""
ONE_MORE = re.compile(
    r"gemma|gemma2|gemma3(_text)?|qwen3_next|qwen3_5(_moe)?(_text)?|qwen4_exp_text|minimax_m3_vl(_text)?|step3p[57]"
)
"""Architectures whose norms multiply by one more than their weight."""

RECOMPUTED = re.compile(
    r"(?:.*\.)?(?:(?:rotary_emb|rotary_pos_emb|rotary|rope)\.(?:\w+_)?(?:inv_freq|cos_cached|sin_cached)|"
    r"position_ids|masked_bias|(?:attn|attention)\.bias)"
)
"""Buffers that older versions of the libraries stored: no loader reads them."""
IGNORED = (
    (
        re.compile(
            r"(?:.*\.)?(?:vision\w*|visual|audio\w*|vit\w*|image_\w+|embed_vision|embed_audio|multi_modal_projector|"
            r"multimodal_projector|mm_projector|pre_mm_projector_norm|patch_merger|patch_conv)\..*"
        ),
        "part of the image or audio input, which no text passes through",
    ),
    (re.compile(r"(?:.*\.)?mtp\w*\..*"), "multi-token prediction, not loaded"),
    (RECOMPUTED, "recomputed from config.json by every loader"),
)
"""Names of tensors that no text model uses, with the reason."""

NO_ROLE = (
    (
        re.compile(r"(?:.*\.)?(?:linear_attn|mamba\w*|conv|ssm|mixer)\..*"),
        "linear attention, state space and convolution have no role",
    ),
    (re.compile(r".*\bindexer\b.*|self_attn\.index_.*"), "attention's choice of keys has no role"),
    (
        re.compile(r".*(?:per_layer|altup|laurel|hyper_connection|\bhc_|\bple\b).*"),
        "residual streams and inputs beside the main one have no role",
    ),
)
"""Below the layer: kinds of tensors without a counterpart across architectures."""
UNKNOWN = "the table of roles does not have it"


@lru_cache(maxsize=1 << 16)
def roles_of(below: str) -> tuple[tuple[str, ...], int | None]:
    """The roles that a name below a layer may hold, and the expert it names."""
    for pattern, roles in IN_LAYERS:
        if match := pattern.fullmatch(below):
            expert = match.groupdict().get("expert")
            return tuple(match.expand(roles).split()), None if expert is None else int(expert)
    if not below.endswith(".bias"):
        return (), None
    owners, number = roles_of(below.removesuffix("bias") + "weight")
    owner = owners[0] if len(owners) == 1 else "".join(owners[:1]).partition(".")[0]
    return ((f"{owner}.bias",) if owner else ()), number


@lru_cache(maxsize=1 << 16)
def signs_of(below: str) -> tuple[str, ...]:
    """What a name says of the others in its layer."""
    return tuple(sign for sign, pattern in SIGNS.items() if pattern.fullmatch(below))


@lru_cache(maxsize=1 << 16)
def reason_to_ignore(name: str) -> str | None:
    """Why no text model uses a tensor; None if it may."""
    return next((reason for pattern, reason in IGNORED if pattern.fullmatch(name)), None)


def reason_without_role(below: str) -> str:
    """Why a name below a layer has no role."""
    return next((reason for pattern, reason in NO_ROLE if pattern.fullmatch(below)), UNKNOWN)
