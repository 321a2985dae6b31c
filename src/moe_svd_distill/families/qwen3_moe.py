"""Qwen3-MoE: routed experts in every layer except those in ``mlp_only_layers``."""

from moe_svd_distill.families.family import Family
from moe_svd_distill.families.roles import attention, ends, gated_mlp, layer_norms, routed_experts

FAMILY = Family(
    model_type="qwen3_moe",
    roles=ends()
    + layer_norms()
    + attention(head_norms=True)
    + gated_mlp("dense", "mlp", as_parameter=True)
    + routed_experts(),
    experts_keys=("num_experts", "num_local_experts"),
    expert_neurons_keys=("moe_intermediate_size",),
)
