"""A pass as it is asked for, what it leaves on the disk, and what it says about itself.

On the disk lies what was recorded after the last finished layer, and in the end the final states. Files are named by
the hash of everything the states depend on. So a pass that was killed is resumed, and one that was finished is found,
by whoever asks for the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.adapter.adapter_file import sha256_of
from moe_svd_distill.algebra.dtypes import compute_dtype
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import UsageError
from moe_svd_distill.execution.parts import reject_part
from moe_svd_distill.files.names import ADAPTER_FILE, CONFIGURATION_FILE
from moe_svd_distill.files.writing import make_folder, remove_stale_temporaries
from moe_svd_distill.streaming.overlay import ScaledAdapter
from moe_svd_distill.streaming.states_file import LayerInputs, StatesFile, find_fault, write_states

_FORMAT = 2


@dataclass(frozen=True)
class PassSettings:
    """How a pass runs, and what it leaves. None of it changes the result by more than rounding.

    Args:
        devices: Devices that share the sequences, all of one kind; one of them may be named more than once.
        dtype: Type to compute in; by default as of `algebra.dtypes.compute_dtype`.
        batch_tokens: Tokens computed at once on a device, rounded down to whole sequences (at least one).
        activation_bytes: The most memory that hidden states between two layers may take; beyond it they stay on the
            disk. By default a quarter of the free memory.
        keep: Whether the final states stay on the disk after the result is closed.
        record_at: A layer behind the first; what it is given is kept beside the final states, so that it and those
            behind it can be run again.
    """

    devices: tuple[str, ...] = ("cpu",)
    dtype: torch.dtype | None = None
    batch_tokens: int = 2048
    activation_bytes: int | None = None
    keep: bool = True
    record_at: int | None = None

    def torch_devices(self) -> tuple[torch.device, ...]:
        """The devices, each with its index.

        Raises:
            UsageError: There is none, or they are of several kinds.
        """
        found = tuple(_device(name) for name in self.devices)
        kinds = sorted({device.type for device in found})
        if len(kinds) != 1:
            named = ", ".join(kinds) or "none"
            raise UsageError(f"A pass runs on devices of one kind, found {named}", "Name CPUs only or GPUs only")
        return found

    def compute_dtype(self, width: int = 0) -> torch.dtype:
        """The type that the pass of a model of this width computes in."""
        return compute_dtype(self.torch_devices()[0], width) if self.dtype is None else self.dtype

    def rows_per_batch(self, length: int) -> int:
        """Sequences of this length that go through a layer together."""
        return max(1, self.batch_tokens // length)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is no device", "Name devices such as cpu, cuda:0") from error
    return torch.device(device.type, device.index or 0) if device.type != "cpu" else torch.device("cpu")


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
        seconds_computing: Forward passes, and writing files meanwhile.
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


class StreamedStates:
    """The final hidden states of all sequences, after the decoder's last norm.

    Attributes:
        path: The file, safetensors with one tensor of states.
        shape: Sequences, length, width.
        dtype: The type computed in.
        record: What the pass did.
        inputs: What was recorded at the layer that was asked for.
    """

    def __init__(self, path: Path, record: PassRecord, keep: bool = True, inputs: LayerInputs | None = None) -> None:
        self.path, self.record, self.inputs, self._keep = path, record, inputs, keep
        self._file: StatesFile | None = StatesFile(path)
        self.shape: tuple[int, int, int] = (self._file.shape[0], self._file.shape[1], self._file.shape[2])
        self.dtype: torch.dtype = self._file.dtype

    def rows(self, rows: slice) -> Tensor:
        """The states of some sequences, (rows, length, d), as a private view on the file: nothing is copied."""
        if self._file is None:
            raise ValueError(f"{self.path} was closed")
        return self._file.rows(rows)

    def close(self) -> None:
        """Let go of the file, and remove it if it was not to be kept. Tensors that were read stay valid."""
        self._file = None
        if not self._keep:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> StreamedStates:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def pass_key(
    checkpoint: Checkpoint, sequences: NDArray[np.int64], settings: PassSettings, adapter: ScaledAdapter | None
) -> str:
    """The hash that names a pass: equal only where the final states are.

    Args:
        checkpoint: The model.
        sequences: Token ids, (n, length).
        settings: Of these the type computed in, the kind of device, and the sequences in a batch: another number gives
            other roundings.
        adapter: What is applied to the model.
    """
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    identity: dict[str, Any] = {
        "format": _FORMAT,
        "model": checkpoint.cache_key(),
        "tokens": hashlib.sha256(np.ascontiguousarray(sequences, dtype="<i8").tobytes()).hexdigest(),
        "shape": list(sequences.shape),
        "rows": settings.rows_per_batch(sequences.shape[1]),
        "dtype": str(settings.compute_dtype()),
        "device": settings.torch_devices()[0].type,
        "versions": versions,
        "visit": None,  # passes of earlier versions have it, and are found
    }
    if adapter is not None:
        import peft

        scales = adapter.scales
        versions["peft"] = peft.__version__
        identity["adapter"] = [sha256_of(adapter.folder / name) for name in (ADAPTER_FILE, CONFIGURATION_FILE)]
        identity["scales"] = dict(sorted(scales.items())) if isinstance(scales, Mapping) else float(scales)
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class PassFiles:
    """The files of one pass in a folder.

    Attributes:
        rejected: Names of damaged files that were moved aside.
    """

    def __init__(self, folder: Path, key: str, layers: int, kept: int | None = None) -> None:
        """Look for nothing yet.

        Args:
            folder: Where the files lie.
            key: Of the pass.
            layers: Of the model.
            kept: The number of layers after which what was recorded is kept for good.
        """
        self._folder, self.key, self._layers, self._kept = folder, key, layers, kept
        self.rejected: list[str] = []
        make_folder(folder)
        remove_stale_temporaries(folder)

    @property
    def final_path(self) -> Path:
        """Where the final states lie."""
        return self._folder / f"states-{self.key}.safetensors"

    def layer_path(self, done: int) -> Path:
        """Where what was recorded after this many layers lies."""
        return self._folder / f"states-{self.key}.layer-{done:04d}.safetensors"

    def keeps(self, done: int) -> bool:
        """Whether what was recorded after this many layers is kept for good."""
        return done == self._kept

    def finished(self) -> bool:
        """Whether the final states and what is kept beside them are there and whole.

        A damaged file is moved aside, and the rest is forgotten where what is kept is missing.
        """
        if self._kept and not self._checked(self.layer_path(self._kept), self._kept):
            self._remove(range(self._kept + 1, self._layers))
            self.final_path.unlink(missing_ok=True)
            return False
        return self._checked(self.final_path, None)

    def newest(self) -> int:
        """After how many layers, at most, what was recorded is there; damaged files are moved aside."""
        return next((done for done in range(self._layers - 1, 0, -1) if self._checked(self.layer_path(done), done)), 0)

    def write(self, done: int, layout: Mapping[str, Any], sequences: int, batches: Iterable[Tensor]) -> Path:
        """Put what was recorded after some layers on the disk, and remove that of the layers before.

        Args:
            done: How many layers.
            layout: What it takes to go on from there.
            sequences: How many the batches have together.
            batches: Of bytes, (rows, bytes of a sequence).

        Raises:
            CannotWriteError: The disk is full, or the folder does not let itself be written to.
        """
        path = self.layer_path(done)
        write_states(path, self._body(done) | {"layout": dict(layout)}, sequences, batches)
        self._remove(range(1, done))
        return path

    def finish(self, sequences: int, batches: Iterable[Tensor]) -> None:
        """Put the final states on the disk, and remove everything else that is not kept."""
        write_states(self.final_path, self._body(None), sequences, batches)
        self._remove(range(1, self._layers))

    def _remove(self, layers: Iterable[int]) -> None:
        for done in layers:
            if done != self._kept:
                self.layer_path(done).unlink(missing_ok=True)

    def _body(self, done: int | None) -> dict[str, object]:
        return {"format": _FORMAT, "key": self.key, "layers": self._layers, "done": "all" if done is None else done}

    def _checked(self, path: Path, done: int | None) -> bool:
        if not path.exists():
            return False
        if find_fault(path, self._body(done)) is None:
            return True
        self.rejected.append(reject_part(path).name)
        return False
