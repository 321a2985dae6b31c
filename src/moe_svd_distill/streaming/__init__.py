"""Models far larger than memory, run one decoder layer at a time straight from their checkpoints.

Whatever transformers knows how to build runs here, on CPU or GPUs, with or without a LoRA adapter, in the memory of two
layers. Nothing here is imported before it is needed by `--help` or `inspect`: it imports torch.
"""

from moe_svd_distill.architecture.matrices import Matrix
from moe_svd_distill.streaming.decoder import Decoder
from moe_svd_distill.streaming.groups import GROUPS, Scales, group_of
from moe_svd_distill.streaming.head import Head, head_of, head_over_common_tokens, load_head
from moe_svd_distill.streaming.result import LayerInputs, StreamedStates
from moe_svd_distill.streaming.settings import PassRecord, PassSettings
from moe_svd_distill.streaming.stream import stream_states
from moe_svd_distill.streaming.visit import LayerVisit, Visit

__all__ = [
    "GROUPS",
    "Decoder",
    "Head",
    "LayerInputs",
    "LayerVisit",
    "Matrix",
    "PassRecord",
    "PassSettings",
    "Scales",
    "StreamedStates",
    "Visit",
    "group_of",
    "head_of",
    "head_over_common_tokens",
    "load_head",
    "stream_states",
]
