"""Where a model's states come from: the model in memory, or one layer of it at a time."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from moe_svd_distill.evaluation.loading import fits

if TYPE_CHECKING:
    from moe_svd_distill.calibration.text import TokenizedText
    from moe_svd_distill.evaluation.from_states import Block, Logits, Progress
    from moe_svd_distill.evaluation.result import Place

Mode: TypeAlias = Literal["auto", "resident", "streamed"]
"""In memory as transformers loads it, layer by layer from its files, or in memory where it fits."""


class StudentSource(Protocol):
    """A student to read the states of."""

    @property
    def place(self) -> Place:
        """Where they come from."""

    def reading(
        self, text: TokenizedText, adapter: Path | None, name: str, on_progress: Progress | None = None
    ) -> AbstractContextManager[tuple[Iterable[Block], Logits]]:
        """The states of a text and the head, with an adapter as PEFT loads it or untouched, inside the context."""


def place_of(folder: Path, device: str, mode: Mode) -> Place:
    """Decide for one model: as asked, or resident where the free memory of the device is enough."""
    if mode == "auto":
        return "resident" if fits(folder, device) else "streamed"
    return mode
