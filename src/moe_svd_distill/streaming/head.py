"""The output head of a checkpoint: what turns final hidden states into logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_svd_distill.algebra.logits import LogitTransform
from moe_svd_distill.architecture.head import check_is_linear, measure_head
from moe_svd_distill.architecture.skeleton import HEAD, build_skeleton
from moe_svd_distill.architecture.stored import CheckpointMap
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.streaming.groups import Scales
from moe_svd_distill.streaming.overlay import AdapterOverlay
from moe_svd_distill.streaming.settings import PassSettings
from moe_svd_distill.streaming.weights import Weights


@dataclass(frozen=True, eq=False)
class Head:
    """An output head.

    Attributes:
        weight: (V, d), without rows that pad it; tied embeddings are what they are tied to, and an adapter is added in.
        bias: (V,), or None.
        transform: What the architecture does after it.
    """

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states (…, d) to logits (…, V), in the head's type and on its device."""
        return self.transform(nn.functional.linear(hidden.to(self.weight), self.weight, self.bias))


def load_head(
    checkpoint: Checkpoint,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    adapter: Path | None = None,
    scales: Scales = 1.0,
) -> Head:
    """Read a model's head, and nothing else of it.

    Args:
        checkpoint: The model.
        device: Where to.
        dtype: Type of the head; by default float32 on the CPU and bfloat16 elsewhere. An adapter is added in float32
            before the weight is rounded to it.
        adapter: Folder of a LoRA adapter.
        scales: Factor on the adapter, or one for each group of its weights.

    Raises:
        BadDataError: The head is missing, or the adapter does not fit.
        IncompatiblePairError: The model has no head, or does something unknown after it.
    """
    settings = PassSettings((device,), dtype)
    place, kind = settings.places()[0], settings.compute_dtype()
    skeleton = build_skeleton(checkpoint.config, checkpoint.source, kind if adapter is None else torch.float32, "cpu")
    measured = measure_head(skeleton.model)
    sources = CheckpointMap(checkpoint, skeleton)
    overlay = None if adapter is None else AdapterOverlay(skeleton, adapter, scales, checkpoint.config)
    weights = Weights(checkpoint, skeleton, sources, overlay, torch.device("cpu") if adapter else place)
    weights.attach(HEAD, weights.read(HEAD))
    head: Any = skeleton.head if overlay is None else overlay.merged_head()
    check_is_linear(head)
    rows = slice(measured.tokens)
    bias = None if getattr(head, "bias", None) is None else head.bias.detach()[rows].to(place, kind)
    return Head(head.weight.detach()[rows].to(place, kind), bias, measured.transform)
