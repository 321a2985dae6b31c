"""Whether a student is the one that an adapter was made for: another one of the same shapes loads it as well."""

from __future__ import annotations

from pathlib import Path

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint
from moe_svd_distill.errors import MissingInputError, shown
from moe_svd_distill.files.names import RECORD_FILE


def notes_on_student(folder: Path, student: Checkpoint | Path | None) -> tuple[str, ...]:
    """What to say where a run's record names other weights than these as its student.

    Args:
        folder: The adapter's.
        student: The student, or its folder, which may hold nothing but a configuration.
    """
    record = read_json(folder / RECORD_FILE) if (folder / RECORD_FILE).is_file() else {}
    made_for = record.get("student")
    recorded = made_for.get("fingerprint") if isinstance(made_for, dict) else None
    if not isinstance(made_for, dict) or not isinstance(recorded, str) or student is None:
        return ()
    try:
        checkpoint = student if isinstance(student, Checkpoint) else open_checkpoint(student)
        differs = checkpoint.is_other_than(recorded)
    except MissingInputError:
        return ()
    if not differs:
        return ()
    return (
        f"{checkpoint.title} has other weights than the student the adapter was made for, "
        f"{shown(str(made_for.get('source')))} in {RECORD_FILE}: the same change means something else there",
    )
