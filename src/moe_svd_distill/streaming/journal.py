"""What a pass leaves on the disk: what was recorded after its last finished layer, and in the end the final states.

Files are named by the hash of everything the states depend on. So a pass that was killed is resumed, and one that was
finished is found, by whoever asks for the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.adapter.adapter_file import sha256_of
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.execution.parts import reject_part
from moe_svd_distill.files.names import ADAPTER_FILE, CONFIGURATION_FILE
from moe_svd_distill.files.writing import make_folder, remove_stale_temporaries
from moe_svd_distill.streaming.groups import Scales
from moe_svd_distill.streaming.states_file import find_fault, write_states

_FORMAT = 2


def pass_key(
    checkpoint: Checkpoint,
    sequences: NDArray[np.int64],
    rows: int,
    dtype: torch.dtype,
    kind: str,
    adapter: Path | None,
    scales: Scales,
    visit_key: str | None,
) -> str:
    """The hash that names a pass: equal only where the final states are.

    Args:
        checkpoint: The model.
        sequences: Token ids, (n, length).
        rows: Sequences in a batch; another number gives other roundings.
        dtype: Type computed in.
        kind: Kind of device.
        adapter: The adapter's folder.
        scales: Factors on it.
        visit_key: What a visitor calls itself.
    """
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    identity: dict[str, Any] = {
        "format": _FORMAT,
        "model": checkpoint.fingerprint(),
        "tokens": hashlib.sha256(np.ascontiguousarray(sequences, dtype="<i8").tobytes()).hexdigest(),
        "shape": list(sequences.shape),
        "rows": rows,
        "dtype": str(dtype),
        "device": kind,
        "versions": versions,
        "visit": visit_key,
    }
    if adapter is not None:
        import peft

        versions["peft"] = peft.__version__
        identity["adapter"] = [sha256_of(adapter / name) for name in (ADAPTER_FILE, CONFIGURATION_FILE)]
        identity["scales"] = dict(sorted(scales.items())) if isinstance(scales, Mapping) else float(scales)
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class Journal:
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
        self._folder, self.key, self._layers, self._kept = folder, key, layers, kept or None
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

    def finished(self) -> Path | None:
        """The final states, if they and what is kept beside them are there and whole.

        A damaged file is moved aside, and the rest is forgotten where what is kept is missing.
        """
        if self._kept and not self._checked(self.layer_path(self._kept), self._body(self._kept)):
            self._remove(range(self._kept + 1, self._layers))
            self.final_path.unlink(missing_ok=True)
            return None
        return self._checked(self.final_path, self._body(None))

    def newest(self) -> tuple[int, Path] | None:
        """What was recorded after as many layers as possible; damaged files are moved aside."""
        for done in range(self._layers - 1, 0, -1):
            if path := self._checked(self.layer_path(done), self._body(done)):
                return done, path
        return None

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

    def finish(self, sequences: int, batches: Iterable[Tensor]) -> Path:
        """Put the final states on the disk, and remove everything else that is not kept."""
        write_states(self.final_path, self._body(None), sequences, batches)
        self._remove(range(1, self._layers))
        return self.final_path

    def discard(self) -> None:
        """Forget everything there is of the pass."""
        for path in (self.final_path, *(self.layer_path(done) for done in range(1, self._layers))):
            path.unlink(missing_ok=True)

    def _remove(self, layers: Iterable[int]) -> None:
        for done in layers:
            if done != self._kept:
                self.layer_path(done).unlink(missing_ok=True)

    def _body(self, done: int | None) -> dict[str, Any]:
        return {"format": _FORMAT, "key": self.key, "layers": self._layers, "done": "all" if done is None else done}

    def _checked(self, path: Path, body: Mapping[str, Any]) -> Path | None:
        if not path.exists():
            return None
        if find_fault(path, body) is None:
            return path
        self.rejected.append(reject_part(path).name)
        return None
