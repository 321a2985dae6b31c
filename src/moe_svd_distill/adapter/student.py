"""The student of an adapter: found, and told from another one of the same shapes, which loads the adapter as well."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint
from moe_svd_distill.errors import MissingInputError, UsageError, shown
from moe_svd_distill.files.names import RECORD_FILE


def student_of(
    student: Checkpoint | Path | str | None, configuration: Mapping[str, object], purpose: str
) -> Architecture:
    """The student an adapter is for: the one given, else the base model of its configuration if that lies here.

    Args:
        student: What the caller was given.
        configuration: The content of adapter_config.json.
        purpose: What the student is needed for, in the words of an error.

    Raises:
        UsageError: There is none at hand.
        BadDataError: It ties its head to its embeddings and stores another one.
    """
    student = named_student(configuration) if student is None else student
    if student is None:
        raise UsageError(f"{purpose} needs the student, and none is at hand", "Give the student")
    found = Architecture(student if isinstance(student, Checkpoint) else open_checkpoint(student))
    found.refuse_other_head()
    return found


def named_student(configuration: Mapping[str, object]) -> Path | None:
    """The base model that an adapter_config.json names, if that is a folder here."""
    named = configuration.get("base_model_name_or_path")
    return Path(named) if isinstance(named, str) and named and (Path(named) / "config.json").is_file() else None


def notes_on_student(folder: Path, student: Checkpoint | Path | None) -> tuple[str, ...]:
    """What to say where run.json names other weights as the student; what is given may be a folder without weights."""
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
