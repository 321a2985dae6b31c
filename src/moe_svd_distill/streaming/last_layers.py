"""The last decoder layers of a model as a small model of their own: what goes into them, and themselves in memory.

One streamed pass leaves the input of the first of them on the disk. From there the final states can be computed again,
and differentiated, with nothing in memory but these layers and what follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.architecture.matrices import find_matrices
from moe_svd_distill.architecture.skeleton import ENDS, Skeleton, build_skeleton, layer_count
from moe_svd_distill.architecture.stored import CheckpointMap
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.durable import make_folder
from moe_svd_distill.execution.parts import reject_part
from moe_svd_distill.streaming.decoder_run import DecoderRun, LayerCall
from moe_svd_distill.streaming.journal import Journal, pass_key
from moe_svd_distill.streaming.result import StreamedStates
from moe_svd_distill.streaming.settings import PassSettings
from moe_svd_distill.streaming.states_file import StatesFile, find_fault, write_states
from moe_svd_distill.streaming.stream import stream_states
from moe_svd_distill.streaming.visit import LayerVisit
from moe_svd_distill.streaming.weights import Weights


def stream_with_inputs(
    checkpoint: Checkpoint,
    sequences: NDArray[np.int64],
    folder: Path,
    settings: PassSettings,
    last: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[StreamedStates, StatesFile]:
    """A pass that also keeps what goes into the first of the last layers.

    Args:
        checkpoint: The model.
        sequences: Token ids, (n, length).
        folder: Where the states lie.
        settings: As for ``stream_states``.
        last: How many layers count as the last.
        on_progress: Told the layers done and their number.

    Returns:
        The final states, and the inputs, (n, length, d).

    Raises:
        DistillError: As ``stream_states``.
    """
    layers = layer_count(checkpoint.config, checkpoint.source)
    first = layers - last
    name = f"inputs-{first}"
    rows = max(1, settings.batch_tokens // sequences.shape[1])
    kind = settings.places()[0].type
    key = pass_key(checkpoint, sequences, rows, settings.compute_dtype(), kind, None, 1.0, name)
    path = Path(folder) / f"{name}-{key}.safetensors"
    make_folder(Path(folder))
    body = {"key": key, "layer": first}
    found = path.is_file() and _whole(path, body)

    def keep(visit: LayerVisit) -> None:
        if visit.index == first:
            write_states(path, body, len(sequences), (batch.hidden.cpu() for batch in visit.batches()))

    journal = Journal(Path(folder), key, layers)
    beyond = (journal.final_path, *(journal.layer_path(done) for done in range(first + 1, layers + 1)))
    if not found and any(later.is_file() for later in beyond):
        journal.discard()  # the pass would skip the layer whose input is missing
    states = stream_states(
        checkpoint,
        sequences,
        folder,
        settings,
        visit=keep,
        visit_key=name,
        on_progress=on_progress,
    )
    return states, StatesFile(path)


def _whole(path: Path, body: Mapping[str, Any]) -> bool:
    if find_fault(path, body) is None:
        return True
    reject_part(path)
    return False


class LastLayers:
    """The last layers and the decoder's end, in float32, in memory.

    Attributes:
        weights: Every stored matrix of the layers that lies in one place of a parameter.
        fixed: Stored matrices of the layers that an operation of transformers takes apart: they cannot be changed.
    """

    def __init__(self, skeleton: Skeleton, run: DecoderRun, sources: CheckpointMap, first: int, length: int) -> None:
        self._skeleton, self._run, self._first, self._length = skeleton, run, first, length
        self._calls: dict[int, list[LayerCall]] = {}
        matrices = find_matrices(skeleton, sources)
        self.weights = [matrix for matrix in matrices if int(matrix.part) >= first]
        self.fixed = list(matrices.left_out)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Inputs of the first layer (rows, length, d) to final hidden states (rows, length, d)."""
        count = len(inputs)
        if count not in self._calls:
            self._calls[count] = self._run.calls(count)
        states = inputs
        for index in range(self._first, len(self._skeleton.originals)):
            call = self._calls[count][index]
            states = call(self._skeleton.originals[index], states)
        return self._run.finish(states)

    def require_gradients(self, hub_names: set[str]) -> None:
        """Let the backward pass leave gradients in the parameters that hold these tensors."""
        for weight in self.weights:
            weight.parameter.requires_grad_(weight.name in hub_names or weight.parameter.requires_grad)

    def zero_gradients(self) -> None:
        """Forget the gradients."""
        for weight in self.weights:
            weight.parameter.grad = None


def load_last_layers(checkpoint: Checkpoint, last: int, length: int, device: torch.device) -> LastLayers:
    """Read the last layers and what follows them.

    Args:
        checkpoint: The model.
        last: How many layers.
        length: Tokens of a sequence.
        device: Where to.

    Raises:
        BadDataError: There are fewer layers, or a tensor is missing.
        IncompatiblePairError: The architecture cannot be run layer by layer.
    """
    skeleton = build_skeleton(checkpoint.config, checkpoint.source, torch.float32, device.type, gradients=True)
    layers = len(skeleton.originals)
    if not 0 < last <= layers:
        raise BadDataError(f"{checkpoint.source} has {layers} layers, not {last}", "Fit at most as many as there are")
    sources = CheckpointMap(checkpoint, skeleton)
    weights = Weights(checkpoint, skeleton, sources, None, device)
    for part in (ENDS, *range(layers - last, layers)):
        weights.attach(part, weights.read(part))
    for module in skeleton.decoder.modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers.get(name) is not None:
                module._buffers[name] = module._buffers[name].to(device)
    return LastLayers(skeleton, DecoderRun(skeleton, device, length), sources, layers - last, length)
