"""Inspect: what a model is, from its headers; or how two are related."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from moe_svd_distill.pipeline.pair import Model, open_model


def inspect(model: Path | str, student: Path | str | None = None) -> Mapping[str, Any]:
    """Architecture, sizes, parameters and tensors of a model; with a student, how it is related to its teacher.

    Raises:
        DistillError: A model cannot be opened.
    """
    if student is not None:
        from moe_svd_distill.pipeline.method import compare_models

        return compare_models(str(model), str(student))
    gc.disable()  # of a hundred thousand headers: looking for cycles that are not there takes a quarter of the time
    try:
        return _facts(open_model(str(model), headers_only=True))
    finally:
        gc.enable()


def _facts(opened: Model) -> Mapping[str, Any]:
    layout, checkpoint = opened.layout, opened.checkpoint
    parameters, active = layout.parameters(opened.shapes)
    embedding = layout.find("embedding")
    return {
        "family": layout.model_type,
        **asdict(layout.geometry),
        "parameters": parameters,
        "active_parameters": active,
        "embedding_parameters": prod(opened.shapes[embedding]) if embedding else 0,
        "quantisation": checkpoint.quantisation,
        "tensors": len(checkpoint),
        "bytes": checkpoint.total_bytes,
        "files": len({info.file for info in checkpoint.stored.values()}),
        "types": dict(Counter(info.dtype for info in checkpoint.values())),
        "stored_types": dict(Counter(info.dtype for info in checkpoint.stored.values())),
        "roles": dict(Counter(meaning.role for meaning in layout.meanings.values())),
        "without_role": dict(layout.without_role),
        "not_used": {**layout.ignored, **checkpoint.set_aside},
    }
