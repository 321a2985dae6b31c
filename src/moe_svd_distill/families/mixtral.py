"""Mixtral: routed experts in every layer, named w1 (gate), w3 (up) and w2 (down)."""

from moe_svd_distill.families.family import Family
from moe_svd_distill.families.roles import attention, ends, layer_norms, routed_experts

FAMILY = Family(
    model_type="mixtral",
    roles=ends() + layer_norms() + attention() + routed_experts(path="block_sparse_moe", gate="w1", up="w3", down="w2"),
    experts_keys=("num_local_experts", "num_experts"),
    expert_neurons_keys=("intermediate_size",),
)
