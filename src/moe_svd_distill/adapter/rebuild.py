"""adapter_config.json for an adapter that has none or a wrong one, from the header of its tensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_svd_distill.adapter.adapter_file import adapter_header, read_json, shapes_of
from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.inference import Inference, infer_family
from moe_svd_distill.adapter.key_repair import unmatched_keys
from moe_svd_distill.adapter.pair_shapes import pair_shapes, whole_shapes
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.families.registry import family_of


def rebuild_configuration(
    adapter_file: Path | str, student: Path | str | None = None, *, base_model: str | None = None
) -> dict[str, Any]:
    """The content of a right adapter_config.json. No weights are loaded.

    Args:
        adapter_file: The adapter's file or folder.
        student: The student's folder. Without it the family is inferred from the names; `inference_of` says how.
        base_model: What to write as the base model; the student's folder if not given.

    Raises:
        MissingInputError: A file is not there.
        BadDataError: PEFT matches none of the keys as they are named (nothing is renamed silently), or the tensors
            cannot be one adapter.
    """
    shapes = shapes_of(adapter_header(adapter_file))
    _refuse_unmatched(shapes, adapter_file)
    if student is None:
        guess = infer_family(_changed(shapes))
        return build_configuration(shapes, guess.family, base_model=base_model or "", student_layers=guess.layers)
    config = read_json(Path(student) / "config.json")
    family = family_of(config, str(student))
    geometry = family.geometry(config)
    return build_configuration(
        shapes,
        family,
        base_model=base_model or str(student),
        student_layers=geometry.layers,
        tied_embeddings=geometry.tied_embeddings,
    )


def inference_of(adapter_file: Path | str) -> Inference:
    """What `rebuild_configuration` assumes about the student when none is given.

    Raises:
        MissingInputError: There is no such file.
        BadDataError: The keys are not PEFT's, or no known family has all of the tensors.
    """
    return infer_family(_changed(shapes_of(adapter_header(adapter_file))))


def _changed(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return [*pair_shapes(shapes), *whole_shapes(shapes)]


def _refuse_unmatched(keys: dict[str, tuple[int, ...]], adapter_file: Path | str) -> None:
    if faults := unmatched_keys(keys):
        raise BadDataError(
            f"{adapter_file}: PEFT never matches {len(faults)} of {len(keys)} tensors and would load the adapter as "
            f"if they were not there; the first: {next(iter(faults.values()))}",
            "Write a copy with repaired names (repair_keys), or write the adapter again; no configuration can help",
        )
