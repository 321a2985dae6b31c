"""Whether an adapter is complete, loads, and does something: the checks that neither PEFT nor safetensors makes.

PEFT drops what it does not recognise without an error, so nothing but its own load path proves that an adapter does
anything. It is run on a model without memory, built on the meta device from the student's config.json alone, with meta
tensors of the header's shapes: no weight is read and the check of a 100-billion-parameter student needs megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from moe_svd_distill.adapter.adapter_file import (
    adapter_header,
    read_json,
    scan_values,
    sha256_of,
    shapes_of,
)
from moe_svd_distill.adapter.configuration import check_options, pair_of_tied, rank_and_scale
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.naming import pair_shapes, whole_modules
from moe_svd_distill.adapter.peft_model import (
    MAKE_AGAIN,
    NAME,
    load,
    lora_targets,
    read_configuration,
    replaced_modules,
    wrap,
)
from moe_svd_distill.adapter.student import named_student, notes_on_student, student_of
from moe_svd_distill.adapter.whole_head import change_of_head
from moe_svd_distill.architecture.building import build_on_meta, parse_config
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import BadDataError, MissingInputError, NothingToTransferError, UsageError
from moe_svd_distill.files.names import ADAPTER_FILE, CONFIGURATION_FILE, RECORD_FILE


@dataclass(frozen=True)
class LoadReport:
    """What PEFT did with an adapter.

    Attributes:
        keys: Tensors in the adapter's file.
        targets: Modules and parameters of the loaded model that received a pair.
        scales: Name of each of them to the factor PEFT multiplies ``B @ A`` by.
        missing: LoRA weights of the loaded model that no key filled; they would stay at PEFT's start values.
        unexpected: Keys that found no place in the loaded model; PEFT would drop them.
        replaced: Modules of the loaded model whose weight is replaced whole.
    """

    keys: int
    targets: int
    scales: Mapping[str, float]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    replaced: tuple[str, ...] = ()


def check_loads(
    adapter_folder: Path | str, student: Mapping[str, object] | Path | str, *, text_only: bool = False
) -> LoadReport:
    """Load an adapter by PEFT's own path and refuse it unless every key and every module found its partner.

    Args:
        adapter_folder: Folder with adapter_config.json and adapter_model.safetensors.
        student: The student's parsed config.json, or its folder.
        text_only: Whether it is for the student's class for text alone.

    Returns:
        The report; ``missing`` and ``unexpected`` are empty.

    Raises:
        MissingInputError: A file is not there.
        BadDataError: A key is missing or unexpected, a shape differs, ``modules_to_save`` is not what the file holds
            whole, the configuration is not PEFT's, or it asks for more than plain pairs, such as DoRA.
    """
    folder = Path(adapter_folder)
    shapes = shapes_of(adapter_header(folder))
    fields, whole = read_json(folder / CONFIGURATION_FILE), whole_modules(shapes)
    configuration = read_configuration(folder)
    check_options(fields, whole)
    if isinstance(student, Mapping):
        config: Mapping[str, object] = dict(student)
        source = "the student"
    else:
        if not (Path(student) / "config.json").is_file():
            raise MissingInputError(f"{Path(student) / 'config.json'} is not there", "Give the student's folder")
        config, source = read_json(Path(student) / "config.json"), str(student)
    model = build_on_meta(parse_config(config, source), source, text_only=text_only)
    tied_ends = _embedding_and_head(model) if getattr(model, "all_tied_weights_keys", None) and not whole else set()
    wrapped = wrap(model, configuration)
    targets = {target.parameter.removesuffix(".weight"): target for target in lora_targets(wrapped)}
    if tied := tied_ends.intersection(targets):
        raise pair_of_tied(min(tied))
    # Without its entry a key would fill the base model's own weight, and PEFT would report nothing.
    if set(replaced := replaced_modules(wrapped)) != set(whole):
        found = ", ".join(replaced) or "no module"
        raise BadDataError(
            f"PEFT replaces {found} whole (modules_to_save), expected {', '.join(whole) or 'none'}", MAKE_AGAIN
        )
    result = load(wrapped, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    if unexpected := tuple(result.unexpected_keys):
        _refuse("PEFT would drop", unexpected, "no module of the student takes it")
    if missing := tuple(key for key in result.missing_keys if _is_of_adapter(key)):
        _refuse("the adapter leaves empty", missing, "the configuration targets it, but no key fills it")
    scales = {name: target.scale for name, target in targets.items()}
    return LoadReport(len(shapes), len(scales), scales, missing, unexpected, replaced)


def _refuse(what: str, keys: tuple[str, ...], why: str) -> None:
    more = f" and {len(keys) - 1} more keys" if len(keys) > 1 else ""
    raise BadDataError(f"{what} {keys[0]}{more}: {why}", MAKE_AGAIN)


def _embedding_and_head(model: Any) -> set[str]:
    """Names of the embeddings and the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name for name, module in model.named_modules() if any(module is end for end in ends)}


def _is_of_adapter(key: str) -> bool:
    return (".lora_" in key and f".{NAME}" in key) or f".modules_to_save.{NAME}." in key


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
    given = student if student is None or isinstance(student, Checkpoint) else Path(student)
    at_hand = named_student(configuration) if given is None else given
    load = (
        None if at_hand is None else check_loads(place, at_hand.config if isinstance(at_hand, Checkpoint) else at_hand)
    )
    warnings += notes_on_student(place, at_hand)
    if load is None:
        warnings.append("whether PEFT loads every tensor was not checked, because no student was given")
    scales = load.scales if load else {module: rank_and_scale(configuration, module)[1] for module in pairs}
    scale = _common_scale(scales, _intended_scale(record, configuration) if recorded else None)
    if scale != 1.0:
        warnings.append(f"PEFT multiplies every pair by {scale:g}")
    zero = scan_values(header, digest_checked=recorded is not None)
    change = _change_of_head(place, student, configuration) if whole else None
    relative, note = change or (None, "")
    warnings += [note] if note else []
    if whole and relative is None:
        warnings.append(f"{whole[0]} is saved whole; whether it differs from the student's was not checked")
    transferred = _check_effect(len(pairs), zero, record, whole, relative)
    if zero and transferred:
        warnings.append(f"{len(zero)} of {len(pairs)} pairs are zero and change nothing")
    complete = recorded is not None
    return VerifyReport(len(pairs), zero, scale, digest, complete, load, transferred, tuple(warnings), whole)


def _change_of_head(
    folder: Path, student: Checkpoint | Path | str | None, configuration: Mapping[str, object]
) -> tuple[float, str] | None:
    """As `change_of_head`; None also where the student's own head is not at hand."""
    try:
        architecture = student_of(student, configuration, "a comparison")
    except (UsageError, MissingInputError):  # config.json may be all there is of the student
        return None
    return change_of_head(LowRankPairs(folder, architecture), architecture)


def _intended_scale(record: Mapping[str, object], configuration: Mapping[str, object]) -> float:
    """The scale the tool itself writes: 1, or what follows from an alpha that the recipe asked for."""
    recipe, rank = record.get("recipe"), cast("float", configuration["r"])
    alpha = recipe.get("alpha") if isinstance(recipe, Mapping) else None
    return 1.0 if alpha is None else float(alpha) / float(rank)


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
    pairs: int, zero: tuple[str, ...], record: Mapping[str, object], whole: tuple[str, ...], change: float | None
) -> bool:
    """Whether the adapter changes the student; an adapter that does not must have declared it.

    A head saved whole that could not be compared is believed to be what run.json says, or a change if it says nothing.
    """
    declared = record.get("transferred") is False
    replaced = bool(change)
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
