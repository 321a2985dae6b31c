"""Qwen3, dense: Llama with norms of queries and keys."""

from moe_svd_distill.families.family import Family
from moe_svd_distill.families.roles import attention, ends, gated_mlp, layer_norms

FAMILY = Family(
    model_type="qwen3",
    roles=ends() + layer_norms() + attention(head_norms=True) + gated_mlp("dense", "mlp"),
)
