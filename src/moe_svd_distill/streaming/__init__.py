"""Models far larger than memory, run one decoder layer at a time straight from their checkpoints.

Whatever transformers knows how to build runs here, on CPU or GPUs, with or without a LoRA adapter, in the memory of two
layers. Nothing here is imported before it is needed by `--help` or `inspect`: it imports torch.
"""

from moe_svd_distill.architecture.matrices import Matrix
from moe_svd_distill.streaming.groups import GROUPS, Scales, group_of
from moe_svd_distill.streaming.head import Head, load_head
from moe_svd_distill.streaming.last_layers import LastLayers, load_last_layers, stream_with_inputs
from moe_svd_distill.streaming.result import StreamedStates
from moe_svd_distill.streaming.settings import PassRecord, PassSettings
from moe_svd_distill.streaming.stream import stream_states
from moe_svd_distill.streaming.visit import LayerBatch, LayerVisit, Visit

__all__ = [
    "GROUPS",
    "Head",
    "LastLayers",
    "LayerBatch",
    "LayerVisit",
    "Matrix",
    "PassRecord",
    "PassSettings",
    "Scales",
    "StreamedStates",
    "Visit",
    "group_of",
    "load_head",
    "load_last_layers",
    "stream_states",
    "stream_with_inputs",
]
