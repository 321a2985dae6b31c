"""A checkpoint as the model that transformers builds of it: where everything an adapter can change lies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from moe_svd_distill.architecture.matrices import LayerMatrices, Matrix, find_matrices
from moe_svd_distill.architecture.skeleton import EMBEDDING, HEAD, ParameterSlot, Skeleton, build_skeleton
from moe_svd_distill.architecture.stored import CheckpointMap
from moe_svd_distill.checkpoints import Checkpoint, refuse_other_head
from moe_svd_distill.errors import IncompatiblePairError


class Architecture:
    """A model without memory for its weights, joined with the names and shapes of its checkpoint.

    Attributes:
        checkpoint: The model's files.
        text_only: Whether it is built as the class for text alone, where the checkpoint's own takes more.
        skeleton: The model on the meta device.
        stored: Which stored tensors make which parameters.
        matrices: What a LoRA pair can change in the decoder layers.
    """

    def __init__(self, checkpoint: Checkpoint, *, text_only: bool = False) -> None:
        """Read no weights.

        Raises:
            BadDataError: transformers cannot build the model, or a tensor is missing or has no place.
            IncompatiblePairError: It is no causal language model.
        """
        self.checkpoint, self.text_only = checkpoint, text_only
        self.skeleton: Skeleton = build_skeleton(
            checkpoint.config, checkpoint.title, torch.float32, "cpu", text_only=text_only
        )
        self.stored = CheckpointMap(checkpoint, self.skeleton)
        self.matrices: LayerMatrices = find_matrices(self.skeleton, self.stored)

    @property
    def config(self) -> Any:
        """As transformers understands it."""
        return self.skeleton.model.config

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.skeleton.originals)

    @cached_property
    def parameters(self) -> Mapping[str, tuple[Matrix, ...]]:
        """Name in memory of each parameter of the layers that a pair can change to the matrices in it."""
        found: dict[str, list[Matrix]] = defaultdict(list)
        for matrix in self.matrices:
            found[matrix.slot.name].append(matrix)
        return {name: tuple(matrices) for name, matrices in found.items()}

    @cached_property
    def by_name(self) -> Mapping[str, Matrix]:
        """The matrices of the layers by name."""
        return {matrix.name: matrix for matrix in self.matrices}

    @cached_property
    def head_slot(self) -> ParameterSlot:
        """The weight of the output head.

        Raises:
            IncompatiblePairError: The model has no head with a weight.
        """
        return self._weight(HEAD, "output head")

    @cached_property
    def embedding_slot(self) -> ParameterSlot:
        """The weight of the token embeddings.

        Raises:
            IncompatiblePairError: The model has no table of embeddings.
        """
        return self._weight(EMBEDDING, "token embeddings")

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embeddings' matrix."""
        tied = getattr(self.skeleton.model, "all_tied_weights_keys", None) or {}
        return self.head_slot.name in tied or self.embedding_slot.name in tied

    @cached_property
    def embedding(self) -> str:
        """Stored name of the token embeddings."""
        return self._stored_name(self.embedding_slot)

    @cached_property
    def head(self) -> str:
        """Name of the output head: stored, or in memory where it is tied to the embeddings."""
        return self.head_slot.name if self.tied else self._stored_name(self.head_slot)

    def refuse_other_head(self) -> None:
        """Refuse a model that is tied, by its configuration or by what its class does without, and stores another head.

        Raises:
            BadDataError: It does.
        """
        for source in self.stored.of_part[HEAD] if self.tied else ():
            for name in source.hub_names:
                if name != self.embedding and self.checkpoint.is_readable:
                    refuse_other_head(self.checkpoint, name, self.embedding)

    def _weight(self, part: str, what: str) -> ParameterSlot:
        found = [slot for slot in self.skeleton.of_part(part) if slot.attribute == "weight" and len(slot.shape) == 2]
        if len(found) != 1:
            raise IncompatiblePairError(
                f"{type(self.skeleton.model).__name__} has {len(found)} weights of its {what}, expected one",
                "Report the architecture to the project",
            )
        return found[0]

    def _stored_name(self, slot: ParameterSlot) -> str:
        sources = [source for source in self.stored.of_part[slot.part] if slot in source.slots]
        names = [name for source in sources for name in source.hub_names]
        return names[0] if len(names) == 1 else slot.name
