"""A causal language model over token sequences, one decoder layer after the other, straight from its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.architecture.skeleton import (
    EMBEDDING,
    ENDS,
    Skeleton,
    build_skeleton,
    layer_count,
)
from moe_svd_distill.architecture.stored import CheckpointMap
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import BadDataError, UsageError
from moe_svd_distill.execution.memory import MemoryWatch, give_back
from moe_svd_distill.streaming.budget import activation_budget
from moe_svd_distill.streaming.crew import Crew
from moe_svd_distill.streaming.decoder_run import DecoderRun, LayerCall
from moe_svd_distill.streaming.groups import Scales
from moe_svd_distill.streaming.journal import Journal, pass_key
from moe_svd_distill.streaming.overlay import AdapterOverlay
from moe_svd_distill.streaming.replicas import replicate
from moe_svd_distill.streaming.result import StreamedStates
from moe_svd_distill.streaming.settings import PassRecord, PassSettings
from moe_svd_distill.streaming.states import States, slices, states_from
from moe_svd_distill.streaming.visit import LayerBatch, LayerVisit, Visit
from moe_svd_distill.streaming.weights import Prefetcher, Weights

_STATES_OF_A_BATCH = 32  # what a layer holds at once while it computes a batch, as multiples of the batch's states
Progress = Callable[[int, int], None]


def stream_states(
    checkpoint: Checkpoint,
    sequences: NDArray[np.int64],
    folder: Path,
    settings: PassSettings | None = None,
    *,
    adapter: Path | None = None,
    scales: Scales = 1.0,
    visit: Visit | None = None,
    visit_key: str | None = None,
    keep: bool = True,
    on_progress: Progress | None = None,
) -> StreamedStates:
    """The decoder's final hidden states (after the last norm) for every token, from a model of any size.

    Each weight is read once, one layer ahead of the layer that computes: at most two layers are in memory. After every
    layer the states are on the disk, so that a pass killed at any moment goes on at the last finished layer, and ends
    in the same bytes. A finished pass is found by the next call that asks for the same.

    Args:
        checkpoint: The model.
        sequences: Token ids, (n, length); all of one length, without padding.
        folder: Where the states lie.
        settings: Devices, type, batch size, memory for states.
        adapter: Folder of a LoRA adapter to apply as PEFT does.
        scales: Factor on the adapter, or one for each group of its weights (attention, mlp, experts, head,
            embeddings).
        visit: Called with every layer while it is in memory, before its forward pass.
        visit_key: What to call the visitor in the pass's identity. With it, a layer whose results are on the disk is
            not visited again, so the visitor must have put its own results on the disk before it returns. Without it,
            a pass with a visitor always begins anew and visits all layers.
        keep: Whether the final states stay on the disk after the result is closed.
        on_progress: Told the layers done and their number.

    Raises:
        UsageError: Token ids that the model does not have, or devices that do not go together.
        BadDataError: A tensor is missing, has a wrong shape or no place; or states are not finite.
        IncompatiblePairError: The architecture cannot be run layer by layer.
        CannotWriteError: The disk is full.
    """
    begin = time.perf_counter()
    settings = settings or PassSettings()
    _check_tokens(sequences)
    anonymous = visit is not None and visit_key is None
    identity = None if visit is None else (visit_key or "anonymous")
    rows = max(1, settings.batch_tokens // sequences.shape[1])
    dtype, kind = settings.compute_dtype(), settings.places()[0].type
    key = pass_key(checkpoint, sequences, rows, dtype, kind, adapter, scales, identity)
    layers = layer_count(checkpoint.config, checkpoint.source)
    journal = Journal(Path(folder), key, layers)
    if anonymous:
        journal.discard()
    if path := journal.finished():
        record = PassRecord(
            key, layers, 0, layers, seconds=time.perf_counter() - begin, rejected=tuple(journal.rejected)
        )
        return StreamedStates(path, record, keep)
    skeleton = build_skeleton(checkpoint.config, checkpoint.source, dtype, kind)
    _check_vocabulary(sequences, skeleton)
    with _Pass(checkpoint, skeleton, sequences, journal, settings, adapter, scales) as running:
        path, facts = running.run(visit, on_progress)
    record = PassRecord(key, layers, **facts, seconds=time.perf_counter() - begin)
    return StreamedStates(path, record, keep)


class _Pass:
    """One pass under way."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        skeleton: Skeleton,
        sequences: NDArray[np.int64],
        journal: Journal,
        settings: PassSettings,
        adapter: Path | None,
        scales: Scales,
    ) -> None:
        self._skeleton, self._journal = skeleton, journal
        self._ids = torch.from_numpy(np.ascontiguousarray(sequences, dtype=np.int64))
        self._places = settings.places()
        self._rows = max(1, settings.batch_tokens // sequences.shape[1])
        self._budget = activation_budget() if settings.activation_bytes is None else settings.activation_bytes
        self._watch = MemoryWatch()
        self._sources = CheckpointMap(checkpoint, skeleton)
        overlay = None if adapter is None else AdapterOverlay(skeleton, adapter, scales, checkpoint.config)
        self._weights = Weights(checkpoint, skeleton, self._sources, overlay, self._places[0], self._watch.look)
        self._reader = Prefetcher(self._weights, self._places[0])
        threads = None
        if self._places == (torch.device("cpu"),):
            self._places, threads = self._on_cores(skeleton.model.config.get_text_config().hidden_size)
        self._crew = Crew(self._places, threads)
        self._stack = ExitStack()
        self._computing = 0.0

    def __enter__(self) -> _Pass:
        self._stack.enter_context(self._crew)
        self._stack.enter_context(self._reader)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, visit: Visit | None, on_progress: Progress | None) -> tuple[Path, dict[str, Any]]:
        """All of it; returns the file of the final states, and the facts for the record."""
        layers = len(self._skeleton.originals)
        self._weights.attach(ENDS, self._reader.take(ENDS))
        self._move_buffers()
        run = DecoderRun(self._skeleton, self._places[0], self._ids.shape[1])
        calls = {size: run.calls(size) for size in {batch.stop - batch.start for batch in self._batches()}}
        done, states = self._start(run)
        reused = done
        if on_progress:
            on_progress(done, layers)
        for index in range(done, layers):
            self._layer(index, {size: each[index] for size, each in calls.items()}, states, visit)
            if on_progress:
                on_progress(index + 1, layers)
        place = self._places[0]
        final = (run.finish(states.rows(rows).to(place)).cpu() for rows in self._batches())
        path = self._journal.finish(len(self._ids), final)
        self._watch.look()
        return path, {
            "layers_computed": layers - reused,
            "layers_reused": reused,
            "bytes_needed": self._sources.decoder_bytes(),
            "bytes_read": self._weights.bytes_read,
            "spilled": states.spilled,
            "seconds_reading": self._reader.seconds_reading,
            "seconds_computing": self._computing,
            "seconds_waiting": self._reader.seconds_waiting,
            "peak_anonymous_bytes": self._watch.look(),
            "unused": self._sources.unused,
            "rejected": tuple(self._journal.rejected),
        }

    def _start(self, run: DecoderRun) -> tuple[int, States]:
        """Layers that are done already and the states after them; without any, the embeddings."""
        found = self._journal.newest()
        if found is None:
            self._weights.attach(EMBEDDING, self._reader.take(EMBEDDING))
            self._reader.start(0)
            embedded = (self._finite(run.embed(self._ids[rows]).cpu(), "the embeddings") for rows in self._batches())
            found = 0, self._journal.write(0, len(self._ids), embedded)
            self._weights.release(EMBEDDING)
            give_back()
        done, path = found
        return done, states_from(path, self._budget, self._rows)

    def _layer(self, index: int, calls: dict[int, LayerCall], states: States, visit: Visit | None) -> None:
        """Read, visit, compute, put on the disk and forget one layer."""
        self._weights.attach(index, self._reader.take(index))
        if index + 1 < len(self._skeleton.originals):
            self._reader.start(index + 1)
        begin = time.perf_counter()
        first = replicate(self._skeleton.originals[index], self._places[0])
        if visit is not None:
            name = f"{self._skeleton.prefix}{index}"
            visit(
                LayerVisit(
                    index,
                    len(self._skeleton.originals),
                    name,
                    first,
                    self._places[0],
                    lambda: self._inputs(calls, states),
                )
            )
        copies = [first, *(replicate(first, place) for place in self._places[1:])]
        work = [
            _Work(copy, {size: call.on(place) for size, call in calls.items()}, states, place)
            for copy, place in zip(copies, self._places, strict=True)
        ]

        def results() -> Iterator[Tensor]:
            for rows, output in self._crew.map(work, self._batches()):
                self._finite(output, f"layer {index}")
                states.take_in(rows, output)
                self._watch.look()
                yield output

        states.turn_to(self._journal.write(index + 1, len(self._ids), results()))
        del first, copies, work
        self._weights.release(index)
        give_back()
        self._computing += time.perf_counter() - begin

    def _on_cores(self, width: int) -> tuple[tuple[torch.device, ...], int]:
        """The processor as often as torch has threads, batches and memory allow, and the threads that each gets.

        Layers are made of many small operations, which many threads hardly speed up: two batches on a thread each took
        25 s where one on two threads took 46.
        """
        threads = torch.get_num_threads()
        one = self._rows * self._ids.shape[1] * width * self._skeleton.dtype.itemsize * _STATES_OF_A_BATCH
        count = max(1, min(threads, len(self._batches()), self._budget // one))
        return self._places * count, threads // count

    def _inputs(self, calls: dict[int, LayerCall], states: States) -> Iterator[LayerBatch]:
        for rows in self._batches():
            hidden = states.rows(rows).to(self._places[0], copy=True)
            yield LayerBatch(rows, hidden, calls[rows.stop - rows.start].on(self._places[0]))

    def _batches(self) -> Sequence[slice]:
        return list(slices(len(self._ids), self._rows))

    def _move_buffers(self) -> None:
        """Buffers around the layers, such as rotary frequencies, follow the weights."""
        inside = {id(module) for layer in self._skeleton.originals for module in layer.modules()}
        for module in self._skeleton.decoder.modules():
            if id(module) not in inside:
                for name in module._non_persistent_buffers_set:
                    if module._buffers.get(name) is not None:
                        module._buffers[name] = module._buffers[name].to(self._places[0])

    def _finite(self, states: Tensor, what: str) -> Tensor:
        if not bool(torch.isfinite(states).all()):
            raise BadDataError(
                f"{what} of {type(self._skeleton.model).__name__} gives states that are not finite in {states.dtype}",
                "Verify the model and the adapter, or compute in a wider type",
            )
        return states


class _Work:
    """A layer on a device, ready for batches."""

    def __init__(
        self, layer: torch.nn.Module, calls: dict[int, LayerCall], states: States, place: torch.device
    ) -> None:
        self._layer, self._calls, self._states, self._place = layer, calls, states, place

    def __call__(self, rows: slice) -> Tensor:
        hidden = self._states.rows(rows).to(self._place, copy=True)  # a layer may write into what it is given
        return self._calls[rows.stop - rows.start](self._layer, hidden)


def _check_tokens(sequences: NDArray[np.int64]) -> None:
    if sequences.ndim != 2 or 0 in sequences.shape or not np.issubdtype(sequences.dtype, np.integer):
        raise UsageError(
            f"Token ids are {sequences.dtype} of shape {sequences.shape}, expected integers (sequences, length)",
            "Give at least one sequence of at least one token",
        )


def _check_vocabulary(sequences: NDArray[np.int64], skeleton: Skeleton) -> None:
    size = skeleton.vocabulary
    low, high = int(sequences.min()), int(sequences.max())
    if low < 0 or high >= size:
        raise UsageError(
            f"Token ids run from {low} to {high}, the model has {size} tokens", "Use the model's own tokenizer"
        )
