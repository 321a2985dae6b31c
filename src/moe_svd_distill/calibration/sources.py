"""The calibration text of a recipe: one pool, or several that count by shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from moe_svd_distill.calibration.documents import Document, Portion
from moe_svd_distill.calibration.reading import ReadText, enough_characters, read_text
from moe_svd_distill.recipe import TextSource

OTHERS = "the others"


def read_sources(
    sources: Sequence[TextSource], *, field: str | None, group_field: str | None, tokens: int | None
) -> ReadText:
    """Read the text of sources for so many tokens; sources with a share count by it, the others together by the rest.

    What two of them hold counts towards the first.

    Args:
        sources: What a recipe names.
        field: Where the text of a record is, unless a source says so.
        group_field: What names the source a record belongs to.
        tokens: How many will be used at most; None for all.

    Raises:
        DistillError: As `read_text`.
    """
    found: dict[str, Document] = {}
    counts: Counter[str] = Counter()
    notes: list[str] = []
    for portion, pool in _pools(sources):
        for own_field in dict.fromkeys(source.field for source in pool):
            read = read_text(
                [source.path for source in pool if source.field == own_field],
                field=own_field or field,
                group_field=group_field,
                limit_characters=enough_characters(tokens),
            )
            for document in read.documents:
                found.setdefault(document.identity, replace(document, portion=portion) if portion else document)
            counts.update(read.counts)
            notes += read.notes
    return ReadText(tuple(found.values()), dict(counts), tuple(notes))


def _pools(sources: Sequence[TextSource]) -> list[tuple[Portion | None, list[TextSource]]]:
    sharing = [source for source in sources if source.share is not None]
    others = [source for source in sources if source.share is None]
    pools: list[tuple[Portion | None, list[TextSource]]] = [
        (Portion(source.path, source.share or 0.0), [source]) for source in sharing
    ]
    if others or not sharing:
        rest = Portion(OTHERS, 1 - sum(source.share or 0.0 for source in sharing)) if sharing else None
        pools.append((rest, others))
    return pools
