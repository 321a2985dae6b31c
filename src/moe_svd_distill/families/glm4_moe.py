"""GLM-4.5 and 4.6 MoE: dense first layers, a shared expert, a correction bias of the router, and a prediction layer.

The multi-token-prediction layer stands after the last decoder layer (``model.layers.<num_hidden_layers>``); loaders
leave it out.
"""

from moe_svd_distill.families.family import Axis, Family, TensorRole
from moe_svd_distill.families.roles import LAYER, attention, ends, gated_mlp, layer_norms, routed_experts

FAMILY = Family(
    model_type="glm4_moe",
    roles=ends()
    + layer_norms()
    + attention(head_norms=True)
    + gated_mlp("dense", "mlp", as_parameter=True)
    + gated_mlp("shared", "mlp.shared_experts", as_parameter=True)
    + routed_experts()
    + (
        TensorRole(
            "router.correction_bias", f"{LAYER}mlp.gate.e_score_correction_bias", (Axis.EXPERTS,), optional=True
        ),
    ),
    experts_keys=("n_routed_experts", "num_local_experts"),
    expert_neurons_keys=("moe_intermediate_size",),
)
