"""Building blocks that several families share: each function returns the roles of one kind of module."""

from __future__ import annotations

from moe_svd_distill.families.family import Axis, Carrier, TensorRole

LAYER = "model.layers.{layer}."


def ends() -> tuple[TensorRole, ...]:
    """Embeddings, final norm and head."""
    return (
        TensorRole(
            "embedding",
            "model.embed_tokens.weight",
            (Axis.VOCABULARY, Axis.RESIDUAL),
            Carrier.EMBEDDING,
            "embed_tokens",
        ),
        TensorRole("norm.final", "model.norm.weight", (Axis.RESIDUAL,)),
        TensorRole(
            "head",
            "lm_head.weight",
            (Axis.VOCABULARY, Axis.RESIDUAL),
            Carrier.MODULE,
            "lm_head",
            norm="norm.final",
            optional=True,
        ),
    )


def layer_norms() -> tuple[TensorRole, ...]:
    """The two norms of a pre-norm decoder layer."""
    return (
        TensorRole("norm.attention", LAYER + "input_layernorm.weight", (Axis.RESIDUAL,)),
        TensorRole("norm.mlp", LAYER + "post_attention_layernorm.weight", (Axis.RESIDUAL,)),
    )


def attention(*, head_norms: bool = False) -> tuple[TensorRole, ...]:
    """Grouped-query attention with optional biases, and Qwen3's norms of queries and keys."""
    base = LAYER + "self_attn."
    sides = {
        "q": (Axis.QUERY_HEADS, Axis.RESIDUAL),
        "k": (Axis.KEY_VALUE_HEADS, Axis.RESIDUAL),
        "v": (Axis.KEY_VALUE_HEADS, Axis.RESIDUAL),
        "o": (Axis.RESIDUAL, Axis.QUERY_HEADS),
    }
    weights = tuple(
        TensorRole(
            f"attention.{side}",
            f"{base}{side}_proj.weight",
            axes,
            Carrier.MODULE,
            f"{side}_proj",
            norm=None if side == "o" else "norm.attention",
        )
        for side, axes in sides.items()
    )
    biases = tuple(
        TensorRole(f"attention.{side}.bias", f"{base}{side}_proj.bias", (axes[0],), optional=True)
        for side, axes in sides.items()
    )
    norms = tuple(
        TensorRole(f"attention.{side}_norm", f"{base}{side}_norm.weight", (Axis.HEAD_DIMENSION,), optional=True)
        for side in ("q", "k")
    )
    return weights + biases + (norms if head_norms else ())


def gated_mlp(prefix: str, path: str, *, as_parameter: bool = False) -> tuple[TensorRole, ...]:
    """A gated MLP (gate, up, down) of a layer, dense or shared expert.

    Args:
        prefix: Role prefix, ``dense`` or ``shared``.
        path: Module path below the layer, for example ``mlp``.
        as_parameter: Name the weights in ``target_parameters``: PEFT rewrites these leaf names into expert parameters
            in mixture-of-experts families and would then silently drop the module.
    """
    axes = {
        "gate": (Axis.NEURONS, Axis.RESIDUAL),
        "up": (Axis.NEURONS, Axis.RESIDUAL),
        "down": (Axis.RESIDUAL, Axis.NEURONS),
    }
    weights = tuple(
        TensorRole(
            f"{prefix}.{side}",
            f"{LAYER}{path}.{side}_proj.weight",
            side_axes,
            Carrier.PARAMETER if as_parameter else Carrier.MODULE,
            f"{path}.{side}_proj.weight" if as_parameter else f"{side}_proj",
            norm=None if side == "down" else "norm.mlp",
            optional=True,
        )
        for side, side_axes in axes.items()
    )
    biases = tuple(
        TensorRole(f"{prefix}.{side}.bias", f"{LAYER}{path}.{side}_proj.bias", (side_axes[0],), optional=True)
        for side, side_axes in axes.items()
    )
    return weights + biases


def routed_experts(
    *, path: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[TensorRole, ...]:
    """A linear router and per-expert 2-D tensors, which transformers 5 holds fused under ``mlp.experts``."""
    experts = LAYER + path + ".experts.{expert}."
    return (
        TensorRole(
            "router",
            f"{LAYER}{path}.gate.weight",
            (Axis.EXPERTS, Axis.RESIDUAL),
            Carrier.PARAMETER,
            "mlp.gate.weight",
            norm="norm.mlp",
            optional=True,
        ),
        TensorRole(
            "experts.gate",
            f"{experts}{gate}.weight",
            (Axis.NEURONS, Axis.RESIDUAL),
            Carrier.FUSED_EXPERT,
            "experts.gate_up_proj",
            norm="norm.mlp",
            optional=True,
        ),
        TensorRole(
            "experts.up",
            f"{experts}{up}.weight",
            (Axis.NEURONS, Axis.RESIDUAL),
            Carrier.FUSED_EXPERT,
            "experts.gate_up_proj",
            norm="norm.mlp",
            optional=True,
        ),
        TensorRole(
            "experts.down",
            f"{experts}{down}.weight",
            (Axis.RESIDUAL, Axis.NEURONS),
            Carrier.FUSED_EXPERT,
            "experts.down_proj",
            optional=True,
        ),
    )
