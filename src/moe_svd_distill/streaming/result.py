"""Final hidden states on the disk, and what a layer on the way to them was given."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from moe_svd_distill.streaming.carried import NOTHING, Gate
from moe_svd_distill.streaming.settings import PassRecord
from moe_svd_distill.streaming.states_file import StatesFile


class LayerInputs:
    """What was recorded at a layer for all sequences of a pass: the layers from there on can be run again.

    Attributes:
        layer: Its number. Nothing is recorded at the first one: there everything follows from the token ids.
        path: The file.
        layout: What it takes to go on from there, for `Layout.decode`.
    """

    def __init__(self, layer: int, path: Path | None) -> None:
        self.layer, self.path = layer, path
        self._file = None if path is None else StatesFile(path)
        self.layout = None if self._file is None else self._file.body["layout"]
        self._gate: Gate = NOTHING if self._file is None else Gate.decode(self.layout)

    def rows(self, rows: slice) -> list[Tensor]:
        """Of some sequences, (rows, …), as private views on the file."""
        return [] if self._file is None else self._gate.unpack(self._file.rows(rows))


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
