"""What a streamed pass is asked for, and what it says about itself afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_svd_distill.algebra.dtypes import compute_dtype
from moe_svd_distill.errors import UsageError


@dataclass(frozen=True)
class PassSettings:
    """How a pass runs. None of it changes the result by more than rounding.

    Args:
        devices: Devices that share the sequences, all of one kind; one of them may be named more than once.
        dtype: Type to compute in; by default as of `algebra.dtypes.compute_dtype`.
        batch_tokens: Tokens computed at once on a device, rounded down to whole sequences (at least one).
        activation_bytes: The most memory that hidden states between two layers may take; beyond it they stay on the
            disk. By default a quarter of the free memory.
    """

    devices: tuple[str, ...] = ("cpu",)
    dtype: torch.dtype | None = None
    batch_tokens: int = 2048
    activation_bytes: int | None = None

    def places(self) -> tuple[torch.device, ...]:
        """The devices, each with its index.

        Raises:
            UsageError: There is none, or they are of several kinds.
        """
        found = tuple(_place(name) for name in self.devices)
        kinds = sorted({place.type for place in found})
        if len(kinds) != 1:
            named = ", ".join(kinds) or "none"
            raise UsageError(f"A pass runs on devices of one kind, found {named}", "Name CPUs only or GPUs only")
        return found

    def compute_dtype(self, width: int = 0) -> torch.dtype:
        """The type that the pass of a model of this width computes in."""
        return compute_dtype(self.places()[0], width) if self.dtype is None else self.dtype


@dataclass(frozen=True)
class PassRecord:
    """What a pass did.

    Attributes:
        key: Hash of everything that the result depends on.
        layers: Decoder layers of the model.
        layers_computed: Of these, computed by this call.
        layers_reused: Of these, found on the disk.
        bytes_needed: Stored bytes of every tensor that the decoder needs; of embeddings, of the rows of these tokens.
        bytes_read: Stored bytes that this call has read; `bytes_needed` when nothing was reused.
        spilled: Whether the states between two layers stayed on the disk.
        seconds: All of it.
        seconds_reading: The reading thread at work, while the devices compute.
        seconds_computing: Forward passes and visits, and writing the journal meanwhile.
        seconds_waiting: The devices without work, because the next weights were not there yet.
        peak_anonymous_bytes: The process's largest anonymous memory seen during the pass, libraries included.
        unused: Tensors of the checkpoint that the decoder does not need, by name, the head's left out.
        rejected: Damaged files that were moved aside, by name.
    """

    key: str
    layers: int
    layers_computed: int
    layers_reused: int
    bytes_needed: int = 0
    bytes_read: int = 0
    spilled: bool = False
    seconds: float = 0.0
    seconds_reading: float = 0.0
    seconds_computing: float = 0.0
    seconds_waiting: float = 0.0
    peak_anonymous_bytes: int = 0
    unused: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()


def _place(name: str) -> torch.device:
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is no device", "Name devices such as cpu, cuda:0") from error
    return torch.device(place.type, place.index or 0) if place.type != "cpu" else torch.device("cpu")
