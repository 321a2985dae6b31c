"""Checkpoints: a read-only mapping from tensor name to shape, dtype and bytes.

Nothing else in the project opens a model's weights file for reading. Nothing here imports torch before a tensor is
read.
"""

from moe_svd_distill.checkpoints.checkpoint import Checkpoint
from moe_svd_distill.checkpoints.opening import open_checkpoint, refuse_other_head, require_plain_files
from moe_svd_distill.files.header import TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint", "refuse_other_head", "require_plain_files"]
