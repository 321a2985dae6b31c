"""A matrix in stretches of rows, so that arithmetic in a wider dtype never needs a second copy of it."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_ELEMENTS = 1024 * 1024  # 4 MiB in fp32: the allocator hands such blocks out again, larger ones are mapped anew


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Consecutive stretches of rows of a matrix, each small enough to be worked on in fp32."""
    step = max(1, BLOCK_ELEMENTS // columns)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))
