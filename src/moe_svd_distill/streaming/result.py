"""Final hidden states on the disk."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from moe_svd_distill.streaming.settings import PassRecord
from moe_svd_distill.streaming.states_file import StatesFile


class StreamedStates:
    """The final hidden states of all sequences, after the decoder's last norm.

    Attributes:
        path: The file, safetensors with one tensor of states.
        shape: Sequences, length, width.
        dtype: The type computed in.
        record: What the pass did.
    """

    def __init__(self, path: Path, record: PassRecord, keep: bool = True) -> None:
        self.path, self.record, self._keep = path, record, keep
        self._file: StatesFile | None = StatesFile(path)
        self.shape: tuple[int, int, int] = self._file.shape
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
