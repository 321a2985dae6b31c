"""What a GGUF file says of its model, asked for by name; what nobody asked for can be told afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_svd_distill.checkpoints.llama_cpp.header import Value
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.files.header import TensorInfo

ANOTHER = "Give the model's safetensors"
_NO_SETTING = ("vocab_size", "attention.value_length", "rope.scaling.finetuned")


@dataclass(frozen=True)
class Settings:
    """What a file says of its model, below the name of its architecture.

    Attributes:
        source: What the file is called in messages.
        architecture: llama.cpp's name.
        metadata: Name to value.
        tensors: llama.cpp's name to where it lies.
        one_table: Whether embeddings and head are the same but for rounding.
        used: Gathers what was asked for.
    """

    source: str
    architecture: str
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    one_table: bool = False
    used: set[str] = field(default_factory=set)

    def find(self, key: str) -> Any:
        """A setting that is one value, or None."""
        name = f"{self.architecture}.{key}"
        self.used.add(name)
        value = self.metadata.get(name)
        if isinstance(value, tuple) and len(set(value)) == 1:
            return value[0]  # the same for every layer
        if isinstance(value, tuple):
            raise BadDataError(f"{self.source} has another {name} for each layer, which is not read here", ANOTHER)
        return value

    def need(self, key: str) -> Any:
        """A setting that has to be there."""
        value = self.find(key)
        if value is None:
            raise BadDataError(f"{self.source} does not say {self.architecture}.{key}", ANOTHER)
        return value

    def unused(self) -> Sequence[str]:
        """Settings of the architecture that nothing was made of."""
        known = {f"{self.architecture}.{key}" for key in _NO_SETTING}
        return [
            key for key in self.metadata if key.startswith(f"{self.architecture}.") and key not in self.used | known
        ]
