"""Llama: dense, grouped-query attention, optional biases."""

from moe_svd_distill.families.family import Family
from moe_svd_distill.families.roles import attention, ends, gated_mlp, layer_norms

FAMILY = Family(
    model_type="llama",
    roles=ends() + layer_norms() + attention() + gated_mlp("dense", "mlp"),
    ignored={r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "recomputed from config.json by every loader"},
)
