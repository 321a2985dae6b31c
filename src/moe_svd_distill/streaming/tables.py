"""Embedding tables that stay in their file: a look-up reads the rows of its tokens and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_svd_distill.algebra.dtypes import count_not_finite
from moe_svd_distill.architecture.skeleton import EMBEDDING, ENDS, ParameterSlot, Part
from moe_svd_distill.architecture.stored import CheckpointMap
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import BadDataError, IncompatiblePairError

EmbeddingChange = Callable[[Tensor], Tensor]
"""Token ids (n,) to what is added to their embeddings as stored, (n, d)."""

_embedding: Any = nn.functional.embedding


class TableRows:
    """The rows of a stored table, read as they are asked for, by any number of threads.

    Attributes:
        bytes: Stored bytes of the whole table.
    """

    def __init__(
        self, checkpoint: Checkpoint, hub_name: str, dtype: torch.dtype, change: EmbeddingChange | None
    ) -> None:
        self._stored, self._dtype, self._change = checkpoint.read(hub_name), dtype, change
        self._title, self._name = checkpoint.title, hub_name
        self.bytes = checkpoint[hub_name].bytes
        self._seen = torch.zeros(len(self._stored), dtype=torch.bool)

    def read(self, ids: Tensor) -> Tensor:
        """Rows of ids of any shape (…) on the CPU, in the type they are computed with, (…, d).

        Raises:
            BadDataError: One of them is not finite.
        """
        self._seen[ids] = True
        rows = self._stored[ids]
        if count_not_finite(rows):
            raise not_finite(self._title, self._name, self._stored)
        rows = rows.to(self._dtype)
        return rows if self._change is None else rows + self._change(ids.flatten()).view(rows.shape).to(rows)

    @property
    def bytes_read(self) -> int:
        """Stored bytes of the rows that were read, each counted once."""
        return int(self._seen.sum()) * self.bytes // len(self._seen)


class StoredTable(Tensor):
    """Stands for a table as the weight of an embedding; it can be looked up in, and asked for its shape and type.

    Attributes:
        rows: Where its values are.
    """

    rows: TableRows

    @staticmethod
    def of(rows: TableRows, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> StoredTable:
        """A table of this shape, for look-ups on this device."""
        table = torch.zeros((), dtype=dtype, device=device).expand(shape).as_subclass(StoredTable)
        table.rows = rows
        return table

    def on(self, device: torch.device) -> StoredTable:
        """The same for look-ups on another device."""
        return StoredTable.of(self.rows, tuple(self.shape), self.dtype, device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _embedding and isinstance(args[1], cls):
            return args[1].rows.read(args[0].cpu()).to(args[0].device)
        if func is Tensor.detach:
            return args[0]
        found = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if isinstance(found, Tensor) and found is not args[0] and func is not Tensor.as_subclass:
            raise IncompatiblePairError(
                f"The decoder takes its embeddings for something else than a look-up ({func.__name__})",
                "Report the architecture to the project",
            )
        return found


def stored_tables(
    stored: CheckpointMap, device: torch.device, change: EmbeddingChange | None = None
) -> dict[ParameterSlot, StoredTable]:
    """A table for every embedding around the layers that is stored plainly as one tensor.

    Args:
        stored: Where a model's values lie.
        device: For look-ups on this device.
        change: What an adapter adds to the token embeddings.
    """
    checkpoint, found = stored.checkpoint, {}
    parts: tuple[Part, ...] = (EMBEDDING, ENDS)
    for part in parts:
        for source in stored.of_part[part]:
            slot = source.slots[0]
            plain = len(source.pieces) == 1 and source.pieces[0].index is None and source.pieces[0].begin is None
            if not plain or not isinstance(slot.module, nn.Embedding) or slot.attribute != "weight":
                continue
            name = source.pieces[0].hub_name
            if not checkpoint.is_plain(name):
                continue
            rows = TableRows(checkpoint, name, slot.dtype, change if part == EMBEDDING else None)
            found[slot] = StoredTable.of(rows, slot.shape, slot.dtype, device)
    return found


def not_finite(title: str, name: str, stored: Tensor) -> BadDataError:
    """That a stored tensor of a model holds values that are no numbers."""
    what = f"{title}: {name} holds {count_not_finite(stored)} NaN or Inf of {stored.numel()} entries"
    return BadDataError(what, "Repair the checkpoint, or download it again")
