"""The output head of a checkpoint: what turns final hidden states into logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_svd_distill.algebra.divergence import LogitTransform
from moe_svd_distill.architecture.head import MeasuredHead, check_is_linear, measure_head
from moe_svd_distill.architecture.skeleton import HEAD, build_skeleton
from moe_svd_distill.architecture.stored import CheckpointMap
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.streaming.overlay import AdapterOverlay, ScaledAdapter
from moe_svd_distill.streaming.passes import PassSettings
from moe_svd_distill.streaming.weights import WeightReader


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

    def logits(self, states: Tensor) -> Tensor:
        """Final hidden states (…, d) to logits (…, V), in the head's type and on its device."""
        return self.transform(nn.functional.linear(states.to(self.weight), self.weight, self.bias))

    def plus(self, delta: Tensor) -> Head:
        """With a change of its weight, (V, d)."""
        return replace(self, weight=self.weight + delta)


def head_over_common_tokens(head: Head, ids: NDArray[np.int64]) -> Head:
    """The rows of a head for some tokens, in their order; they share its memory where they are the first of it."""
    first = len(ids) <= len(head.weight) and np.array_equal(ids, np.arange(len(ids)))
    rows = slice(len(ids)) if first else torch.from_numpy(ids).to(head.weight.device)
    return replace(head, weight=head.weight[rows], bias=None if head.bias is None else head.bias[rows])


def head_of(module: Any, measured: MeasuredHead, device: torch.device, dtype: torch.dtype = torch.float32) -> Head:
    """The head that a module of a model is, without rows that pad it.

    Raises:
        IncompatiblePairError: It does something else than to multiply by its weight.
    """
    check_is_linear(module)
    rows, bias = slice(measured.tokens), getattr(module, "bias", None)
    return Head(
        module.weight.detach()[rows].to(device, dtype),
        None if bias is None else bias.detach()[rows].to(device, dtype),
        measured.transform,
    )


def load_head(
    checkpoint: Checkpoint,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    tokens: NDArray[np.int64] | None = None,
    adapter: ScaledAdapter | None = None,
) -> Head:
    """Read a model's head, and nothing else of it.

    Args:
        checkpoint: The model.
        device: Where to.
        dtype: Type of the head; by default float32 on the CPU and bfloat16 elsewhere. An adapter is added in float32
            before the weight is rounded to it.
        tokens: Those it has in common with another model; None for all.
        adapter: Added to it.

    Raises:
        BadDataError: The head is missing, or the adapter does not fit.
        IncompatiblePairError: The model has no head, or does something unknown after it.
    """
    settings = PassSettings((device,), dtype)
    place, kind = settings.torch_devices()[0], settings.compute_dtype()
    skeleton = build_skeleton(checkpoint.config, checkpoint.title, kind if adapter is None else torch.float32, "cpu")
    measured = measure_head(skeleton.model)
    stored = CheckpointMap(checkpoint, skeleton)
    overlay = None if adapter is None else AdapterOverlay(stored, adapter)
    WeightReader(stored, place if adapter is None else torch.device("cpu"), overlay).attach(HEAD, here=True)
    head = head_of(skeleton.head if overlay is None else overlay.merged_head(), measured, place, kind)
    return head if tokens is None else head_over_common_tokens(head, tokens)
