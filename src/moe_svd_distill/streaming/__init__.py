"""Models far larger than memory, run one decoder layer at a time straight from their checkpoints.

Whatever transformers knows how to build runs here, on CPU or GPUs, with or without a LoRA adapter, in the memory of two
layers. Nothing here is imported before it is needed by `--help` or `inspect`: it imports torch.
"""

from moe_svd_distill.architecture.matrices import Matrix
from moe_svd_distill.streaming.decoder import Decoder
from moe_svd_distill.streaming.head import Head, head_of, head_over_common_tokens, load_head
from moe_svd_distill.streaming.overlay import GROUPS, ScaledAdapter, Scales, by_group, group_of
from moe_svd_distill.streaming.passes import PassRecord, PassSettings, StreamedStates
from moe_svd_distill.streaming.states_file import LayerInputs
from moe_svd_distill.streaming.stream import stream_states

__all__ = [
    "GROUPS",
    "Decoder",
    "Head",
    "LayerInputs",
    "Matrix",
    "PassRecord",
    "PassSettings",
    "ScaledAdapter",
    "Scales",
    "StreamedStates",
    "by_group",
    "group_of",
    "head_of",
    "head_over_common_tokens",
    "load_head",
    "stream_states",
]
