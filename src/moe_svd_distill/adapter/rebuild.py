"""adapter_config.json for an adapter that has none or a wrong one, from the header of its tensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_svd_distill.adapter.adapter_file import adapter_header, shapes_of
from moe_svd_distill.adapter.configuration import build_configuration, plain_configuration, refuse_incomplete
from moe_svd_distill.adapter.key_repair import unmatched_keys
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.pair_shapes import pair_shapes, whole_modules
from moe_svd_distill.adapter.settling import settle_keys
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import BadDataError


def rebuild_configuration(
    adapter_file: Path | str, student: Path | str | None = None, *, base_model: str | None = None
) -> dict[str, Any]:
    """The content of a right adapter_config.json. No weights are loaded.

    Args:
        adapter_file: The adapter's file or folder.
        student: The student's folder. Without it the configuration names the last part of each module's name alone:
            right for models without experts, and for programs that read an adapter by the names of its tensors.
        base_model: What to write as the base model; the student's folder if not given.

    Raises:
        MissingInputError: A file is not there.
        BadDataError: PEFT matches none of the keys as they are named (nothing is renamed silently), or the tensors
            cannot be one adapter.
    """
    header = adapter_header(adapter_file)
    shapes = shapes_of(header)
    _refuse_unmatched(shapes, adapter_file)
    if student is None:
        ranks = {module: pair.rank for module, pair in pair_shapes(shapes).items()}
        return plain_configuration(ranks, base_model=base_model or "", whole=tuple(whole_modules(shapes)))
    architecture = Architecture(open_checkpoint(student))
    pairs = LowRankPairs(header.file, architecture, configured=False)
    keys, ranks = settle_keys(architecture), {name: pairs.rank(name) for name in pairs}
    for target in keys.changed_by(ranks):
        refuse_incomplete(target, ranks)
    return build_configuration(
        keys,
        pairs.parameter_ranks(),
        base_model=base_model or str(student),
        whole_head=pairs.head is not None,
    )


def _refuse_unmatched(keys: dict[str, tuple[int, ...]], adapter_file: Path | str) -> None:
    if faults := unmatched_keys(keys):
        raise BadDataError(
            f"{adapter_file}: PEFT never matches {len(faults)} of {len(keys)} tensors and would load the adapter as "
            f"if they were not there; the first: {next(iter(faults.values()))}",
            "Write a copy with repaired names (repair_keys), or write the adapter again; no configuration can help",
        )
