"""A causal language model over token sequences, one decoder layer after the other, straight from its checkpoint."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.architecture.building import parse_config
from moe_svd_distill.architecture.skeleton import layer_count
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import BadDataError, UsageError
from moe_svd_distill.streaming.budget import activation_budget
from moe_svd_distill.streaming.crew import Crew
from moe_svd_distill.streaming.decoder import Decoder
from moe_svd_distill.streaming.gates import Call, Shell
from moe_svd_distill.streaming.groups import Scales
from moe_svd_distill.streaming.journal import Journal, pass_key
from moe_svd_distill.streaming.result import LayerInputs, StreamedStates
from moe_svd_distill.streaming.settings import PassRecord, PassSettings
from moe_svd_distill.streaming.states import Recorded, slices
from moe_svd_distill.streaming.states_file import StatesFile
from moe_svd_distill.streaming.visit import LayerVisit, Visit

JOURNAL_SECONDS = 10.0  # between two layers whose results go to the disk so that a killed pass goes on from there
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
    record_at: int | None = None,
    on_progress: Progress | None = None,
) -> StreamedStates:
    """The decoder's final hidden states (after the last norm) for every token, from a model of any size.

    Each weight is read once, one layer ahead of the layer that computes: at most two layers are in memory. After every
    layer, what the next one is given is on the disk, so that a pass killed at any moment goes on at the last finished
    layer, and ends in the same bytes. A finished pass is found by the next call that asks for the same.

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
        record_at: A layer; what it is given is kept beside the final states, so that it and those behind it can be run
            again.
        on_progress: Told the layers done and their number.

    Raises:
        UsageError: Token ids that the model does not have, or devices that do not go together.
        BadDataError: A tensor is missing, has a wrong shape or no place; or states are not finite.
        IncompatiblePairError: The architecture cannot be run layer by layer.
        CannotWriteError: The disk is full.
    """
    begin = time.perf_counter()
    settings = _settled(settings or PassSettings(), checkpoint)
    _check_tokens(sequences)
    anonymous = visit is not None and visit_key is None
    identity = None if visit is None else (visit_key or "anonymous")
    rows = max(1, settings.batch_tokens // sequences.shape[1])
    dtype, kind = settings.compute_dtype(), settings.places()[0].type
    key = pass_key(checkpoint, sequences, rows, dtype, kind, adapter, scales, identity)
    layers = layer_count(checkpoint.config, checkpoint.source)
    journal = Journal(Path(folder), key, layers, record_at)
    if anonymous:
        journal.discard()
    path = journal.finished()
    facts: dict[str, Any] = {"layers_computed": 0, "layers_reused": layers, "rejected": tuple(journal.rejected)}
    if path is None:
        path, facts = _Pass(checkpoint, sequences, rows, journal, settings, adapter, scales).run(visit, on_progress)
    record = PassRecord(key, layers, **facts, seconds=time.perf_counter() - begin)
    inputs = None if record_at is None else LayerInputs(record_at, journal.layer_path(record_at) if record_at else None)
    return StreamedStates(path, record, keep, inputs)


def _settled(settings: PassSettings, checkpoint: Checkpoint) -> PassSettings:
    """With the type that a model of this width computes in."""
    width = parse_config(checkpoint.config, checkpoint.source).get_text_config().hidden_size
    return replace(settings, dtype=settings.compute_dtype(width))


class _Pass:
    """One pass under way."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: NDArray[np.int64],
        rows: int,
        journal: Journal,
        settings: PassSettings,
        adapter: Path | None,
        scales: Scales,
    ) -> None:
        self._journal, self._rows = journal, rows
        self._ids = torch.from_numpy(np.ascontiguousarray(sequences, dtype=np.int64))
        self._budget = activation_budget() if settings.activation_bytes is None else settings.activation_bytes
        self._batches = list(slices(len(self._ids), rows))
        dtype, places, threads = settings.compute_dtype(), settings.places(), None
        if places == (torch.device("cpu"),):
            places, threads = self._on_cores(checkpoint, dtype)
        self._decoder = Decoder(checkpoint, places, dtype, adapter=adapter, scales=scales)
        self._crew = Crew(places, threads)
        self._computing = 0.0
        self._written = time.perf_counter()
        self._name = type(self._decoder.skeleton.model).__name__

    def run(self, visit: Visit | None, on_progress: Progress | None) -> tuple[Path, dict[str, Any]]:
        """All of it; returns the file of the final states, and the facts for the record."""
        decoder, recorded = self._decoder, Recorded(len(self._ids), self._budget)
        try:
            _check_vocabulary(self._ids, decoder.skeleton.vocabulary)
            begin, path = self._journal.newest() or (0, None)
            if path is not None:
                decoder.layout.decode(begin, StatesFile(path).body["layout"])
                recorded.load(decoder.layout.gate(begin), path, self._rows)
            if on_progress:
                on_progress(begin, decoder.layers)
            for index in range(begin, decoder.layers):
                self._layer(index, recorded, visit)
                if on_progress:
                    on_progress(index + 1, decoder.layers)
        finally:
            self._crew.close()
            decoder.close()
        return self._journal.final_path, {
            "layers_computed": decoder.layers - begin,
            "layers_reused": begin,
            "bytes_needed": decoder.bytes_needed,
            "bytes_read": decoder.bytes_read,
            "spilled": recorded.spilled,
            "seconds_reading": decoder.reader.seconds_reading,
            "seconds_computing": self._computing,
            "seconds_waiting": decoder.reader.seconds_waiting,
            "peak_anonymous_bytes": decoder.watch.look(),
            "unused": decoder.stored.unused,
            "rejected": tuple(self._journal.rejected),
        }

    def _layer(self, index: int, recorded: Recorded, visit: Visit | None) -> None:
        """Read, visit, compute and forget one layer."""
        decoder, count = self._decoder, len(self._ids)
        following = index + 1 if index + 1 < decoder.layers else None
        decoder.enter(index, following)
        begin = time.perf_counter()
        if visit is not None:
            self._show(index, recorded, visit)
        work = [partial(self._compute, shell, index, recorded) for shell in decoder.shells]
        results = self._watched(self._crew.map(work, self._batches))
        if following is None:
            self._journal.finish(count, (output for _, output in results))
        else:
            first = next(results)
            recorded.begin(first[1].shape[1])
            packed = self._taken(recorded, chain([first], results))
            path = None
            if self._due(following, recorded, visit):
                path = self._journal.write(following, decoder.layout.encode(following), count, packed)
                self._written = time.perf_counter()
            else:
                deque(packed, maxlen=0)
            recorded.turn_to(decoder.layout.gate(following), path)
        decoder.leave(index)
        self._computing += time.perf_counter() - begin

    def _due(self, following: int, recorded: Recorded, visit: Visit | None) -> bool:
        """Whether what the next layer is given goes to the disk: if need be, and otherwise not all the time."""
        needed = visit is not None or recorded.spilled or self._journal.keeps(following)
        return needed or time.perf_counter() - self._written >= JOURNAL_SECONDS

    def _compute(self, shell: Shell, index: int, recorded: Recorded, rows: slice) -> Tensor:
        """A layer on a batch: what the next one is given as bytes, (rows, bytes), or final states."""
        layout = self._decoder.layout
        ids, given = self._given(shell, recorded, rows)
        if index + 1 == self._decoder.layers:
            return self._finite(layout.states(shell, ids, index, given), index)
        found = layout.step(shell, ids, index, given, learn=rows.start == 0)
        return layout.gate(index + 1).pack([self._finite(tensor, index) for tensor in found])

    def _show(self, index: int, recorded: Recorded, visit: Visit) -> None:
        decoder, shell = self._decoder, self._decoder.shells[0]

        def batches() -> Iterator[tuple[slice, Call]]:
            for rows in self._batches:
                ids, given = self._given(shell, recorded, rows)
                yield rows, decoder.layout.arguments(shell, ids, index, given)

        name = f"{decoder.skeleton.prefix}{index}"
        visit(LayerVisit(index, decoder.layers, name, shell.layers[index], shell.device, batches))

    def _given(self, shell: Shell, recorded: Recorded, rows: slice) -> tuple[Tensor, list[Tensor]]:
        """Token ids and what was recorded, as copies: a layer may write into what it is given."""
        return self._ids[rows].to(shell.device), [t.to(shell.device, copy=True) for t in recorded.rows(rows)]

    def _watched(self, results: Iterator[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
        for result in results:
            self._decoder.watch.look()
            yield result

    @staticmethod
    def _taken(recorded: Recorded, results: Iterator[tuple[slice, Tensor]]) -> Iterator[Tensor]:
        for rows, packed in results:
            recorded.take_in(rows, packed)
            yield packed

    def _on_cores(self, checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[tuple[torch.device, ...], int]:
        """The processor as often as torch has threads, batches and memory allow, and the threads that each gets.

        Layers are made of many small operations, which many threads hardly speed up: two batches on a thread each took
        25 s where one on two threads took 46.
        """
        width = parse_config(checkpoint.config, checkpoint.source).get_text_config().hidden_size
        threads = torch.get_num_threads()
        one = self._rows * self._ids.shape[1] * width * dtype.itemsize * _STATES_OF_A_BATCH
        count = max(1, min(threads, len(self._batches), self._budget // one))
        return (torch.device("cpu"),) * count, threads // count

    def _finite(self, values: Tensor, index: int) -> Tensor:
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise BadDataError(
                f"layer {index} of {self._name} gives states that are not finite in {values.dtype}",
                "Verify the model and the adapter, or compute in a wider type",
            )
        return values


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
