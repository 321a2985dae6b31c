"""What of a text an adapter can be measured on: not what it was made on, nor other text of the same sources."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_svd_distill.report.record import SearchRecord

if TYPE_CHECKING:
    from moe_svd_distill.calibration.text import Document

MOSTLY = 0.5
SAME_SOURCES = (
    "The text is of the sources the adapter was made on, so the gain shown may be larger than on other sources: name "
    "text of others."
)


@dataclass(frozen=True)
class HeldOut:
    """A text without what an adapter has seen.

    Attributes:
        documents: What is left.
        used: Documents left out because the adapter was made on them.
        of_used_groups: Others left out because they are of the same sources.
        repeated: Others left out because most of their words stand in what the adapter was made on; None if that is
            not known, because that text is not here.
        apart: Whether this was possible; if nothing is left, only the documents themselves are left out.
    """

    documents: tuple[Document, ...]
    used: int
    of_used_groups: int = 0
    repeated: int | None = None
    apart: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For evaluation.json."""
        return {
            "documents_used": self.used,
            "documents_of_used_groups": self.of_used_groups,
            "documents_repeated": self.repeated,
            "groups_apart": self.apart,
        }


def held_out(documents: Sequence[Document], search: SearchRecord, calibration: Sequence[Document]) -> HeldOut:
    """Leave out of a text what an adapter was made on.

    Args:
        documents: The text.
        search: Of the adapter's run, which names the documents and groups that were used.
        calibration: The text the adapter was made of, as far as it is here.
    """
    from moe_svd_distill.calibration.text import without, without_groups

    used: Collection[str] = set(search.used_documents)
    fresh = without(documents, used)
    others = without_groups(fresh, set(search.used_groups))
    seen = [document for document in calibration if document.digest in used]
    left = _not_repeated(others, seen) if seen else others
    if not left:
        return HeldOut(fresh, len(documents) - len(fresh), apart=not fresh)
    return HeldOut(
        left,
        len(documents) - len(fresh),
        len(fresh) - len(others),
        len(others) - len(left) if seen else None,
    )


def _not_repeated(documents: Sequence[Document], seen: Sequence[Document]) -> tuple[Document, ...]:
    from moe_svd_distill.calibration.repeats import Repeats

    repeats = Repeats()
    for document in seen:
        repeats.fresh(document)
    return tuple(document for document in documents if repeats.repeated_share(document.text) <= MOSTLY)
