"""How the faults of a checkpoint are worded and gathered: all at once, in one error."""

from __future__ import annotations

from collections.abc import Sequence

from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError

SHOWN_FAULTS = 8  # an error stays readable; `.faults` has all of them


class BadCheckpointError(BadDataError):
    """A checkpoint with one or more faults; the first one is damaged or inconsistent data."""

    faults: tuple[str, ...] = ()


class MissingCheckpointError(MissingInputError):
    """A checkpoint with one or more faults; the first one is a file that is not there."""

    faults: tuple[str, ...] = ()


def raise_faults(faults: Sequence[DistillError]) -> None:
    """Raise one error for all faults: the first one's kind and action, and the wording of the rest."""
    if not faults:
        return
    first = faults[0]
    wordings = tuple(fault.what for fault in faults)
    what = "; ".join(wordings[:SHOWN_FAULTS])
    if len(wordings) > 1:
        what = f"{len(wordings)} faults: {what}"
    if len(wordings) > SHOWN_FAULTS:
        what += f"; and {len(wordings) - SHOWN_FAULTS} more"
    kind = MissingCheckpointError if isinstance(first, MissingInputError) else BadCheckpointError
    error = kind(what, first.action)
    error.faults = wordings
    raise error
