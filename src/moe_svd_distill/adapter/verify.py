"""Whether an adapter is complete, loads, and does something: the checks that neither PEFT nor safetensors makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_svd_distill.adapter.adapter_file import adapter_header, read_json, shapes_of
from moe_svd_distill.adapter.configuration import rank_and_scale
from moe_svd_distill.adapter.digest import sha256_of
from moe_svd_distill.adapter.load_check import LoadReport, check_loads, check_options
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.pair_shapes import pair_shapes, whole_modules
from moe_svd_distill.adapter.values import scan_values
from moe_svd_distill.adapter.whole_change import WholeChange, change_of_head
from moe_svd_distill.adapter.whole_head import student_of
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import BadDataError, MissingInputError, NothingToTransferError, UsageError
from moe_svd_distill.files.names import ADAPTER_FILE, CONFIGURATION_FILE, RECORD_FILE


@dataclass(frozen=True)
class VerifyReport:
    """What was found about a valid adapter.

    Attributes:
        pairs: Low-rank pairs.
        zero_pairs: Modules of those that change nothing.
        scale: The factor PEFT multiplies every ``B @ A`` by.
        sha256: Digest of the tensors' file.
        digest_checked: Whether run.json recorded that digest, so that the file is known to be complete.
        load: What PEFT's load path did, or None where no student was at hand.
        transferred: False for an adapter that run.json declares to be scaled to zero.
        warnings: What is not wrong but should be known.
        whole: Modules that are saved whole.
    """

    pairs: int
    zero_pairs: tuple[str, ...]
    scale: float
    sha256: str
    digest_checked: bool
    load: LoadReport | None
    transferred: bool
    warnings: tuple[str, ...]
    whole: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The outcome in a few words."""
        if not self.transferred:
            return "valid, but scaled to zero: nothing was transferred"
        whole = f", and {', '.join(self.whole)} saved whole" if self.whole else ""
        return f"valid: {self.pairs} pairs, {len(self.zero_pairs)} of them zero{whole}"


def verify(folder: Path | str, student: Checkpoint | Path | str | None = None) -> VerifyReport:
    """Check an adapter's folder; memory stays at one tensor, or two where a head is saved whole.

    Args:
        folder: Folder with adapter_model.safetensors, adapter_config.json and, if this tool wrote it, run.json.
        student: The student or its folder. Without it the base model named in the configuration is used if that is a
            folder here; else the load check is left out, with a warning.

    Raises:
        MissingInputError: A file is not there.
        BadDataError: Header, digest, configuration, load check or values are wrong.
        NothingToTransferError: Neither the pairs nor a head saved whole change anything, undeclared by run.json.
    """
    place = Path(folder)
    if not place.is_dir():
        raise MissingInputError(f"{place} is not a folder", "Give the adapter's folder")
    header = adapter_header(place)
    pairs, whole = pair_shapes(shapes_of(header)), tuple(whole_modules(shapes_of(header)))
    configuration = read_json(place / CONFIGURATION_FILE)
    record = read_json(place / RECORD_FILE) if (place / RECORD_FILE).exists() else {}
    digest, warnings = sha256_of(place / ADAPTER_FILE), []
    recorded = record.get("adapter_sha256")
    if recorded is not None and recorded != digest:
        raise BadDataError(
            f"{place / ADAPTER_FILE} is not the file that was written: sha256 {digest}, expected {recorded}",
            "Copy it again, or run the distillation again: it goes on from its parts",
        )
    if recorded is None:
        warnings.append(f"{RECORD_FILE} records no digest: a half-written file cannot be told from a complete one")
    check_options(configuration, whole)
    folder_or_config = _student(student, configuration)
    load = None if folder_or_config is None else check_loads(place, folder_or_config)
    if load is None:
        warnings.append("whether PEFT loads every tensor was not checked, because no student was given")
    scales = load.scales if load else {module: rank_and_scale(configuration, module)[1] for module in pairs}
    scale = _common_scale(scales, _intended_scale(record, configuration) if recorded else None)
    if scale != 1.0:
        warnings.append(f"PEFT multiplies every pair by {scale:g}")
    zero = scan_values(header, digest_checked=recorded is not None)
    change = _change_of_head(place, student, configuration) if whole else None
    warnings += [change.note] if change and change.note else []
    if whole and change is None:
        warnings.append(f"{whole[0]} is saved whole; whether it differs from the student's was not checked")
    transferred = _check_effect(len(pairs), zero, record, whole, change)
    if zero and transferred:
        warnings.append(f"{len(zero)} of {len(pairs)} pairs are zero and change nothing")
    complete = recorded is not None
    return VerifyReport(len(pairs), zero, scale, digest, complete, load, transferred, tuple(warnings), whole)


def _student(student: Checkpoint | Path | str | None, configuration: Mapping[str, Any]) -> dict[str, Any] | Path | None:
    """The student's configuration or its folder; None where there is none at hand."""
    if isinstance(student, Checkpoint):
        return student.config
    if student is not None:
        return Path(student)
    named = configuration.get("base_model_name_or_path")
    if isinstance(named, str) and named and (Path(named) / "config.json").is_file():
        return Path(named)
    return None


def _change_of_head(
    folder: Path, student: Checkpoint | Path | str | None, configuration: Mapping[str, Any]
) -> WholeChange | None:
    """What a head saved whole changes; None where the student's own is not at hand."""
    try:
        architecture = student_of(student, configuration, "a comparison")
    except (UsageError, MissingInputError):  # config.json may be all there is of the student
        return None
    return change_of_head(LowRankPairs(folder, architecture), architecture)


def _intended_scale(record: Mapping[str, Any], configuration: Mapping[str, Any]) -> float:
    """The scale the tool itself writes: 1, or what follows from an alpha that the recipe asked for."""
    alpha = (record.get("recipe") or {}).get("alpha")
    return 1.0 if alpha is None else float(alpha) / float(configuration["r"])


def _common_scale(scales: Mapping[str, float], intended: float | None) -> float:
    """The scale of all pairs, which is the intended one if there is one."""
    first = next(iter(scales))
    expected = scales[first] if intended is None else intended
    for name, scale in scales.items():
        if not math.isclose(scale, expected, rel_tol=1e-6):
            raise BadDataError(
                f"PEFT would multiply the pair of {name} by {scale:g}, expected {expected:g} as for the others: "
                "alpha and rank do not fit together (rank_pattern without alpha_pattern?)",
                "Make adapter_config.json again with adapter-config",
            )
    return expected


def _check_effect(
    pairs: int, zero: tuple[str, ...], record: Mapping[str, Any], whole: tuple[str, ...], change: WholeChange | None
) -> bool:
    """Whether the adapter changes the student; an adapter that does not must have declared it.

    A head saved whole that could not be compared is believed to be what run.json says, or a change if it says nothing.
    """
    declared = record.get("transferred") is False
    replaced = change is not None and change.relative > 0
    if len(zero) == pairs and not replaced:
        if whole and change is None:
            return not declared
        if not declared:
            raise NothingToTransferError(
                f"all {pairs} pairs are zero: the adapter changes nothing",
                "Run the distillation again with another teacher or method",
            )
        return False
    if declared:
        changed = f"{pairs - len(zero)} pairs are not zero" + (" and a head saved whole differs" if replaced else "")
        raise BadDataError(
            f"{RECORD_FILE} declares that nothing was transferred, but {changed}", "Run the distillation again"
        )
    return True
