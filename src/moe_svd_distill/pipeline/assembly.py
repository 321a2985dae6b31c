"""Putting an adapter together in the staging area: tensors from parts, configuration from their shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.adapter import build_configuration, lora_keys, whole_key
from moe_svd_distill.execution.consolidation import consolidate
from moe_svd_distill.execution.parts import PartContent, write_part
from moe_svd_distill.execution.publish import OutputFolder, write_json_atomic
from moe_svd_distill.execution.tensor_file import read_header
from moe_svd_distill.families.registry import family_of
from moe_svd_distill.pipeline.pair import ModelPair
from moe_svd_distill.pipeline.scale import ScaleDecision
from moe_svd_distill.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe_svd_distill.fitting.rank import HeadRank
    from moe_svd_distill.pipeline.fitted import Fitted

ADAPTER = "adapter_model.safetensors"
CONFIGURATION = "adapter_config.json"
_WHOLE = "whole"


@dataclass(frozen=True)
class Ingredients:
    """What an adapter is made of.

    Attributes:
        parts: Parts of the weights stage.
        scale: Scales of the groups in them.
        head: Part of the fitted head, which takes the place of any other pair of the head.
    """

    parts: Sequence[Path]
    scale: ScaleDecision
    head: Path | None = None


def stage_adapter(output: OutputFolder, recipe: Recipe, pair: ModelPair, made_of: Ingredients) -> str:
    """Write adapter and configuration to the staging area; returns the adapter's sha256."""
    layout = pair.student.layout
    head_name = layout.find("head") or "lm_head.weight"
    bodies = [part for part in made_of.parts if made_of.head is None or not _only(part, head_name)]
    parts = [*bodies, *([made_of.head] if made_of.head else [])]
    slots = [slot for part in parts for slot in read_header(part).slots]
    configuration = build_configuration(
        {peft_key(slot.name): slot.shape for slot in slots},
        family_of(pair.student.checkpoint.config, pair.student.checkpoint.source),
        base_model=base_model(pair),
        student_layers=layout.geometry.layers,
        tied_embeddings=layout.geometry.tied_embeddings,
    )
    # PEFT multiplies B·A by alpha / r. With an alpha of the user's own, B carries the inverse: the product stays.
    peft_scale = 1.0 if recipe.alpha is None else recipe.alpha / configuration["r"]
    if recipe.alpha is not None:
        scaled = {key: rank * peft_scale for key, rank in configuration["alpha_pattern"].items()}
        configuration |= {"lora_alpha": recipe.alpha, "alpha_pattern": scaled}
    fitted = {peft_key(slot.name) for slot in read_header(made_of.head).slots} if made_of.head else set()

    def scale(key: str, tensor: Tensor) -> Tensor:
        if not _is_b(key):
            return tensor
        return tensor * ((1.0 if key in fitted else made_of.scale.factor_of(key)) / peft_scale)

    unchanged = peft_scale == 1.0 and not made_of.scale.changes
    digest = consolidate(parts, output.staged(ADAPTER), rename=peft_key, scale=None if unchanged else scale)
    write_json_atomic(output.staged(CONFIGURATION), configuration)
    return digest


def write_head_part(folder: Path, pair: ModelPair, recipe: Recipe, fitted: Fitted, alone: bool) -> Path:
    """The part of the fitted head: a LoRA pair, or the head whole.

    Args:
        folder: Where parts lie.
        pair: Teacher and student.
        recipe: What is asked for.
        fitted: The head.
        alone: Whether nothing else is in the adapter. PEFT loads no adapter without any pair, so a head saved whole
            then gets the company of one pair of zeros per layer.
    """
    import torch

    layout = pair.student.layout
    name = layout.find("head") or "lm_head.weight"
    left, right = fitted.factors
    tensors: dict[str, torch.Tensor]
    if head_is_whole(recipe, pair):
        base = pair.student.checkpoint.read(layout.find("head") or str(layout.find("embedding")))
        tensors = {f"{name}#{_WHOLE}": (base.float() + fitted.delta).to(base.dtype)}
        if alone and not fitted.pairs:
            tensors |= _zero_pairs(pair, getattr(torch, recipe.dtype))
    else:
        tensors = {f"{name}#A": right, f"{name}#B": left}
    for matrix, (left, right) in fitted.pairs.items():
        tensors |= {f"{matrix}#A": right, f"{matrix}#B": left}
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    record = {"label": "fitted head", "layer": None}
    return write_part(folder, f"head-{digest.hexdigest()[:32]}", PartContent(tensors, record))


def asked_head_rank(recipe: Recipe, pair: ModelPair) -> HeadRank:
    """The rank asked for the fitted head: the last matching pattern's, else the head's."""
    name = pair.student.layout.find("head") or "lm_head.weight"
    matching = [rank for pattern, rank in recipe.ranks.items() if fnmatchcase(name, pattern)]
    return matching[-1] if matching else recipe.head_rank


def head_is_whole(recipe: Recipe, pair: ModelPair) -> bool:
    """Whether the fitted head is saved whole."""
    tied = pair.student.layout.geometry.tied_embeddings
    return recipe.head_format == "whole" or (recipe.head_format == "auto" and tied)


def peft_key(name: str) -> str:
    """The adapter's key of a tensor in a part."""
    hub_name, _, side = name.rpartition("#")
    if side == _WHOLE:
        return whole_key(hub_name)
    key_a, key_b = lora_keys(hub_name)
    return key_a if side == "A" else key_b


def base_model(pair: ModelPair) -> str:
    """What adapter_config.json names as the base."""
    source = pair.student.checkpoint.source
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else source.partition("@")[0]


def _only(part: Path, hub_name: str) -> bool:
    """Whether a part holds pairs of this tensor and of no other."""
    names = {slot.name.rpartition("#")[0] for slot in read_header(part).slots}
    return names == {hub_name}


def _zero_pairs(pair: ModelPair, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    import torch

    layout = pair.student.layout
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layout.geometry.layers):
        name = layout.find("attention.q", layer)
        if name is None:
            continue
        rows, columns = pair.student.shapes[name]
        tensors[f"{name}#A"] = torch.zeros(1, columns, dtype=dtype)
        tensors[f"{name}#B"] = torch.zeros(rows, 1, dtype=dtype)
    return tensors


def _is_b(key: str) -> bool:
    return key.endswith((".lora_B.weight", ".lora_embedding_B"))
