"""Opens teacher and student and gives every tensor of both its meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint, refuse_other_head
from moe_svd_distill.execution.events import DOWNLOADING
from moe_svd_distill.roles import ModelLayout, read_layout

if TYPE_CHECKING:
    from moe_svd_distill.adapter.keys import AdapterKeys
    from moe_svd_distill.architecture.architecture import Architecture

OnDownload: TypeAlias = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Model:
    """A checkpoint and what its tensors mean."""

    checkpoint: Checkpoint
    layout: ModelLayout

    @cached_property
    def architecture(self) -> Architecture:
        """The model as transformers builds it, without memory for its weights; imports torch.

        Raises:
            BadDataError: transformers cannot build it, or a tensor is missing or has no place.
            IncompatiblePairError: It is no causal language model.
        """
        from moe_svd_distill.architecture.architecture import Architecture

        found = Architecture(self.checkpoint)
        found.refuse_other_head()
        return found

    @cached_property
    def keys(self) -> AdapterKeys:
        """What an adapter of the model can change, settled with PEFT.

        Raises:
            DistillError: As `architecture`.
        """
        from moe_svd_distill.adapter.settling import settle_keys

        return settle_keys(self.architecture)

    def role_of(self, name: str) -> str:
        """What a matrix or a stored tensor means, where that is known; of one with several parts, what they mean."""
        views = self.layout.parts_of(name)
        roles = dict.fromkeys(self.layout.meanings[view.name].role for view in views)
        return " and ".join(roles) or "matrix"

    @property
    def active_parameters(self) -> tuple[int, int]:
        """Parameters of the layers and of the head that one token goes through.

        Of the routed experts only as many count as a token is sent to; embeddings are looked up and count nothing.
        """
        layout = self.layout
        outside = sum(prod(meaning.shape) for meaning in layout.meanings.values() if meaning.layer is None)
        return layout.parameters(self.shapes)[1] - outside, layout.geometry.vocabulary * layout.geometry.hidden

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hub name to shape."""
        return {name: info.shape for name, info in self.checkpoint.items()}


@dataclass(frozen=True)
class ModelPair:
    """Teacher and student."""

    teacher: Model
    student: Model

    def cache_keys(self) -> tuple[str, str]:
        """Of both checkpoints, as their files are now."""
        return self.teacher.checkpoint.cache_key(), self.student.checkpoint.cache_key()

    @property
    def tokenizer_notes(self) -> tuple[str, ...]:
        """What people should know of where the tokenizers are from."""
        return self.teacher.checkpoint.tokenizer_notes + self.student.checkpoint.tokenizer_notes

    @property
    def at_hand(self) -> bool:
        """Whether every weights file of both models is on this machine."""
        models = (self.teacher.checkpoint, self.student.checkpoint)
        return all(checkpoint.is_readable and not checkpoint.is_remote for checkpoint in models)


def open_model(
    source: str,
    *,
    headers_only: bool = False,
    remote_cache_gb: float | None = None,
    on_download: OnDownload | None = None,
) -> Model:
    """Open a model and check its headers against its config.json.

    Args:
        source: Folder or hub id.
        headers_only: Of a hub model, fetch no weights; they can be read only if they are in the cache already.
        remote_cache_gb: As of a recipe.
        on_download: Told "downloading" and the model, the bytes that are here, and all bytes.

    Raises:
        MissingInputError: The model or one of its files is not there.
        BadDataError: Files that contradict each other, or a head that is tied and stored otherwise.
    """
    remote_bytes = None if remote_cache_gb is None else int(remote_cache_gb * 10**9)
    told = on_download and partial(on_download, f"{DOWNLOADING}{source}")
    checkpoint = open_checkpoint(source, headers_only=headers_only, remote_bytes=remote_bytes, on_bytes=told)
    shapes = {name: info.shape for name, info in checkpoint.items()}
    layout = read_layout(checkpoint.config, shapes)
    head, embedding = layout.second_head, layout.find("embedding")
    if head and embedding and checkpoint.is_readable and not (headers_only and checkpoint.is_remote):
        refuse_other_head(checkpoint, head, embedding)
    return Model(checkpoint, layout)


@contextmanager
def open_pair(
    teacher: str,
    student: str,
    *,
    headers_only: bool = False,
    remote_cache_gb: float | None = None,
    on_download: OnDownload | None = None,
) -> Iterator[ModelPair]:
    """Open both models as ``open_model`` does; their files are closed at the end."""
    first, second = (
        open_model(source, headers_only=headers_only, remote_cache_gb=remote_cache_gb, on_download=on_download)
        for source in (teacher, student)
    )
    pair = ModelPair(first, second)
    pair.teacher.checkpoint.role, pair.student.checkpoint.role = "teacher", "student"
    try:
        yield pair
    finally:
        pair.teacher.checkpoint.close()
        pair.student.checkpoint.close()
