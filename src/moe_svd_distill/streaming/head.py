"""The output head of a checkpoint: what turns final hidden states into logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_svd_distill.architecture.proxy import ModuleProxy
from moe_svd_distill.architecture.skeleton import HEAD, Skeleton, build_skeleton
from moe_svd_distill.architecture.stored import CheckpointMap
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.streaming.groups import Scales
from moe_svd_distill.streaming.logits import LogitTransform, logit_transform
from moe_svd_distill.streaming.overlay import AdapterOverlay
from moe_svd_distill.streaming.settings import PassSettings
from moe_svd_distill.streaming.weights import Weights

_REPORT = "Report the architecture to the project"
_PROBE_TOKENS, _PROBE_VOCABULARY = 8, 16


@dataclass(frozen=True, eq=False)
class Head:
    """An output head.

    Attributes:
        weight: (V, d); tied embeddings are what they are tied to, and an adapter is added in.
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
    head: Any = skeleton.head
    if head is None or not isinstance(head, nn.Linear):
        raise IncompatiblePairError(
            f"The head of {type(skeleton.model).__name__} is {type(head).__name__}, expected Linear", _REPORT
        )
    transform = _checked_transform(skeleton, head)
    sources = CheckpointMap(checkpoint, skeleton)
    overlay = None if adapter is None else AdapterOverlay(skeleton, adapter, scales, checkpoint.config)
    weights = Weights(checkpoint, skeleton, sources, overlay, torch.device("cpu") if adapter else place)
    weights.attach(HEAD, weights.read(HEAD))
    effective = head if overlay is None else overlay.merged_head()
    bias = None if effective.bias is None else effective.bias.detach().to(place, kind)
    return Head(effective.weight.detach().to(place, kind), bias, transform)


@torch.no_grad()
def _checked_transform(skeleton: Skeleton, head: nn.Linear) -> LogitTransform:
    """The transform, after the model's own forward has given the same on random states and a small random head."""
    model, decoder = skeleton.model, skeleton.decoder
    transform = logit_transform(model.config)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBE_TOKENS, head.in_features, generator=generator)
    small = nn.Linear(head.in_features, _PROBE_VOCABULARY, bias=False)
    small.weight.copy_(torch.randn(small.weight.shape, generator=generator))
    small.to(head.weight.dtype)
    hidden = hidden.to(head.weight.dtype)
    expected = transform(small(hidden)).float()
    places = [*_owners(model, decoder), *_owners(model, head)]
    originals = [getattr(parent, name) for parent, name in places]
    try:
        for (parent, name), original in zip(places, originals, strict=True):
            setattr(parent, name, small if original is head else _Answer(original, hidden))
        ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long)
        found = model(input_ids=ids, use_cache=False).logits.float()
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise IncompatiblePairError(
            f"{type(model).__name__} does something unknown between its decoder and its logits ({error})", _REPORT
        ) from error
    finally:
        for (parent, name), original in zip(places, originals, strict=True):
            setattr(parent, name, original)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        raise IncompatiblePairError(
            f"{type(model).__name__} does something to its logits that is not known here", _REPORT
        )
    return transform


class _Answer(ModuleProxy):
    """A decoder whose final hidden states are known."""

    def __init__(self, original: nn.Module, hidden: Tensor) -> None:
        super().__init__(original)
        object.__setattr__(self, "_hidden", hidden)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        from transformers.utils import ModelOutput

        @dataclass
        class Answer(ModelOutput):
            """Everything that a decoder may be asked for besides its states was not computed."""

            last_hidden_state: Any = None

            def __getattr__(self, name: str) -> None:
                if name.startswith("__"):
                    raise AttributeError(name)

        return Answer(last_hidden_state=object.__getattribute__(self, "_hidden"))


def _owners(model: nn.Module, wanted: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every module and attribute that holds a module."""
    return [
        (parent, name) for parent in list(model.modules()) for name, child in parent._modules.items() if child is wanted
    ]
