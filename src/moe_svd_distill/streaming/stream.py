"""A causal language model over token sequences, one decoder layer after the other, straight from its checkpoint."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.architecture.building import parse_config
from moe_svd_distill.architecture.skeleton import layer_count
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import BadDataError, UsageError
from moe_svd_distill.streaming.carried import NOTHING
from moe_svd_distill.streaming.decoder import Decoder
from moe_svd_distill.streaming.devices import DevicePool, activation_budget
from moe_svd_distill.streaming.gates import GatedDecoder
from moe_svd_distill.streaming.overlay import ScaledAdapter
from moe_svd_distill.streaming.passes import PassFiles, PassRecord, PassSettings, StreamedStates, pass_key
from moe_svd_distill.streaming.states_file import GateValues, LayerInputs, StatesFile, slices

JOURNAL_SECONDS = 10.0  # between two layers whose results go to the disk so that a killed pass goes on from there
_STATES_OF_A_BATCH = 32  # what a layer holds at once while it computes a batch, as multiples of the batch's states
OnLayer = Callable[[int, int], None]


def stream_states(
    checkpoint: Checkpoint,
    sequences: NDArray[np.int64],
    folder: Path,
    settings: PassSettings | None = None,
    *,
    adapter: ScaledAdapter | None = None,
    on_progress: OnLayer | None = None,
) -> StreamedStates:
    """The decoder's final hidden states (after the last norm) for every token, from a model of any size.

    Each weight is read once, one layer ahead of the layer that computes: at most two layers are in memory. What the
    next layer is given goes to the disk from time to time, so that a pass killed at any moment goes on from there, and
    ends in the same bytes. A finished pass is found by the next call that asks for the same.

    Args:
        checkpoint: The model.
        sequences: Token ids, (n, length); all of one length, without padding.
        folder: Where the states lie.
        settings: Devices, type, batch size, memory for states, and what is kept.
        adapter: Applied as PEFT does.
        on_progress: Told the layers done and their number.

    Raises:
        UsageError: Token ids that the model does not have, or devices that do not go together.
        BadDataError: A tensor is missing, has a wrong shape or no place; or states are not finite.
        IncompatiblePairError: The architecture cannot be run layer by layer.
        CannotWriteError: The disk is full.
    """
    begin = time.perf_counter()
    settings = settings or PassSettings()
    settings = replace(settings, dtype=settings.compute_dtype(_width(checkpoint)))
    _check_tokens(sequences)
    layers, first = layer_count(checkpoint.config, checkpoint.title), settings.record_at
    files = PassFiles(Path(folder), pass_key(checkpoint, sequences, settings, adapter), layers, first)
    if files.finished():
        record = PassRecord(files.key, layers, layers_computed=0, layers_reused=layers, rejected=tuple(files.rejected))
    else:
        ids = torch.from_numpy(np.ascontiguousarray(sequences, dtype=np.int64))
        record = _run(checkpoint, ids, files, settings, adapter, on_progress)
    record = replace(record, seconds=time.perf_counter() - begin)
    inputs = LayerInputs(first, files.layer_path(first)) if first else None
    return StreamedStates(files.final_path, record, settings.keep, inputs)


def _run(
    checkpoint: Checkpoint,
    ids: Tensor,
    files: PassFiles,
    settings: PassSettings,
    adapter: ScaledAdapter | None,
    on_progress: OnLayer | None,
) -> PassRecord:
    budget = activation_budget() if settings.activation_bytes is None else settings.activation_bytes
    dtype, devices, threads = settings.compute_dtype(), settings.torch_devices(), None
    batches = list(slices(len(ids), settings.rows_per_batch(ids.shape[1])))
    if devices == (torch.device("cpu"),):
        states_bytes = ids[batches[0]].numel() * _width(checkpoint) * dtype.itemsize
        devices, threads = _on_cores(len(batches), budget // (states_bytes * _STATES_OF_A_BATCH))
    with (
        closing(Decoder(checkpoint, devices, dtype, adapter=adapter)) as decoder,
        closing(DevicePool(devices, threads)) as pool,
    ):
        _check_vocabulary(ids, decoder.skeleton.vocabulary)
        running = _Pass(decoder, pool, files, ids, batches, budget)
        begin = running.resume()
        if on_progress:
            on_progress(begin, decoder.layers)
        for layer in range(begin, decoder.layers):
            running.layer(layer)
            if on_progress:
                on_progress(layer + 1, decoder.layers)
        return PassRecord(
            files.key,
            decoder.layers,
            layers_computed=decoder.layers - begin,
            layers_reused=begin,
            bytes_needed=decoder.bytes_needed,
            bytes_read=decoder.bytes_read,
            spilled=running.spilled,
            seconds_reading=decoder.reader.seconds_reading,
            seconds_computing=running.seconds,
            seconds_waiting=decoder.reader.seconds_waiting,
            peak_anonymous_bytes=decoder.watch.look(),
            unused=decoder.stored.unused,
            rejected=tuple(files.rejected),
        )


class _Pass:
    """All batches through one layer after the other.

    Attributes:
        spilled: Whether what was recorded has stayed on the disk at some layer.
        seconds: Of computing so far.
    """

    def __init__(
        self, decoder: Decoder, pool: DevicePool, files: PassFiles, ids: Tensor, batches: list[slice], budget: int
    ) -> None:
        self._decoder, self._pool, self._files = decoder, pool, files
        self._ids, self._batches, self._budget = ids, batches, budget
        self._values = GateValues(NOTHING, torch.empty(len(ids), 0, dtype=torch.uint8), None)
        self._written = time.perf_counter()
        self.spilled = False
        self.seconds = 0.0

    def resume(self) -> int:
        """Go on from the newest file; returns how many layers are done."""
        if done := self._files.newest():
            path = self._files.layer_path(done)
            self._decoder.knows_inputs(LayerInputs(done, path))
            found = StatesFile(path).rows(slice(None))
            held = found.clone() if found.numel() <= self._budget else None
            self._values = GateValues(self._decoder.layout.gate(done), held, path)
            self.spilled = not self._values.in_memory
        return done

    def layer(self, layer: int) -> None:
        """Read, compute and forget one layer."""
        decoder, following = self._decoder, layer + 1
        decoder.enter(layer, following if following < decoder.layers else None)
        begin = time.perf_counter()
        work = [partial(self._compute, replica, layer) for replica in decoder.replicas]
        results = self._watched(self._pool.map(work, self._batches))
        if following == decoder.layers:
            self._files.finish(len(self._ids), (output for _, output in results))
        else:
            self._values = self._kept(following, results)
        decoder.leave(layer)
        self.seconds += time.perf_counter() - begin

    def _kept(self, following: int, results: Iterator[tuple[slice, Tensor]]) -> GateValues:
        """What a layer is given, in memory as far as the budget goes, and on the disk if need be or if it is time."""
        first = next(results)
        room = self._values.room_for(first[1].shape[1], self._budget)
        self.spilled |= room is None

        def packed() -> Iterator[Tensor]:
            for rows, values in chain([first], results):
                if room is not None:
                    room[rows] = values
                yield values

        path, layout = None, self._decoder.layout
        if self._due(following):
            path = self._files.write(following, layout.encode(following), len(self._ids), packed())
            self._written = time.perf_counter()
        else:
            deque(packed(), maxlen=0)
        return GateValues(layout.gate(following), room, path)

    def _due(self, following: int) -> bool:
        return self.spilled or self._files.keeps(following) or time.perf_counter() - self._written >= JOURNAL_SECONDS

    def _compute(self, replica: GatedDecoder, layer: int, rows: slice) -> Tensor:
        """A layer on a batch: what the next one is given as bytes, (rows, bytes), or final states."""
        layout, ids = self._decoder.layout, self._ids[rows].to(replica.device)
        given = [tensor.to(replica.device, copy=True) for tensor in self._values.rows(rows)]  # a layer may change it
        if layer + 1 == self._decoder.layers:
            return self._finite(layout.states(replica, ids, layer, given), layer)
        found = layout.step(replica, ids, layer, given, learn=rows.start == 0)
        return layout.gate(layer + 1).pack([self._finite(tensor, layer) for tensor in found])

    def _watched(self, results: Iterator[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
        for result in results:
            self._decoder.watch.look()
            yield result

    def _finite(self, values: Tensor, layer: int) -> Tensor:
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            model = self._decoder.stored.checkpoint.title
            raise BadDataError(
                f"{model}: layer {layer} gives states that are not finite in {values.dtype}",
                "Verify the model and the adapter, or compute in a wider type",
            )
        return values


def _on_cores(batches: int, fitting: int) -> tuple[tuple[torch.device, ...], int]:
    """The processor as often as torch has threads, batches and memory allow, and the threads that each gets."""
    # Layers are made of many small operations, which many threads hardly speed up: two batches on a thread each took
    # 25 s where one on two threads took 46.
    threads = torch.get_num_threads()
    count = max(1, min(threads, batches, fitting))
    return (torch.device("cpu"),) * count, threads // count


def _width(checkpoint: Checkpoint) -> int:
    width: int = parse_config(checkpoint.config, checkpoint.title).get_text_config().hidden_size
    return width


def _check_tokens(sequences: NDArray[np.int64]) -> None:
    if sequences.ndim != 2 or 0 in sequences.shape or not np.issubdtype(sequences.dtype, np.integer):
        raise UsageError(
            f"Token ids are {sequences.dtype} of shape {sequences.shape}, expected integers (sequences, length)",
            "Give at least one sequence of at least one token",
        )


def _check_vocabulary(ids: Tensor, size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise UsageError(
            f"Token ids run from {low} to {high}, the model has {size} tokens", "Use the model's own tokenizer"
        )
