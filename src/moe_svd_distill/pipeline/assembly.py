"""Putting an adapter together in the staging area: pairs from parts, written under the keys that PEFT takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.keys import Target, planned_tensors
from moe_svd_distill.adapter.naming import whole_key
from moe_svd_distill.adapter.peft_model import modules_of
from moe_svd_distill.architecture.matrices import Kind
from moe_svd_distill.errors import UsageError
from moe_svd_distill.evaluation.scale_search import ScaleDecision
from moe_svd_distill.execution.parts import Parts, write_part
from moe_svd_distill.execution.planned import Planned, write_tensors
from moe_svd_distill.execution.publish import OutputFolder
from moe_svd_distill.files.header import read_header
from moe_svd_distill.files.names import ADAPTER_FILE, CONFIGURATION_FILE
from moe_svd_distill.files.writing import write_json
from moe_svd_distill.pipeline.pair import Model, ModelPair
from moe_svd_distill.recipe import Recipe
from moe_svd_distill.streaming import group_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe_svd_distill.adapter.keys import Factors
    from moe_svd_distill.pipeline.stage import StageResult
    from moe_svd_distill.training.head_rank import HeadRank

_WHOLE = "whole"


@dataclass(frozen=True)
class AdapterChange:
    """What the stages so far change about the student.

    Attributes:
        parts: Parts of the weights stage.
        scale: Scales of the groups in them.
        head: Part of what was trained, which takes the place of any other pair of the head.
    """

    parts: Sequence[Path]
    scale: ScaleDecision
    head: Path | None = None


def stage_adapter(output: OutputFolder, recipe: Recipe, pair: ModelPair, change: AdapterChange) -> str:
    """Write adapter and configuration to the staging area; returns the adapter's sha256.

    Raises:
        BadDataError: No adapter can hold one of the pairs.
    """
    import torch

    student = pair.student
    head, keys = student.architecture.head, student.keys
    bodies = [part for part in change.parts if change.head is None or not _only(part, head)]
    with Parts([*bodies, *([change.head] if change.head else [])]) as parts:
        fitted = set(read_header(change.head).tensors) if change.head else set()
        pairs = _Pairs(student, parts, fitted, change.scale, getattr(torch, recipe.dtype))
        # PEFT drops pairs under stored names for some of the experts' parameters alone.
        whole_modules = {t.module for t in keys.layers if pairs.changes(t) and t.matrices[0].kind is Kind.EXPERT}
        targets = [t for t in keys.targets.values() if pairs.changes(t) or (t.matrices and t.module in whole_modules)]
        ranks = {target.parameter: target.rank(pairs.rank) for target in targets}
        whole = f"{head}#{_WHOLE}" in parts
        configuration = build_configuration(keys, ranks, base_model=base_model(recipe, pair), whole_head=whole)
        # PEFT multiplies B·A by alpha / r. With an alpha of the user's own, B carries the inverse: the product stays.
        if recipe.alpha is not None:
            scale = recipe.alpha / configuration["r"]
            configuration["lora_alpha"] = recipe.alpha
            pattern = configuration["alpha_pattern"]
            configuration["alpha_pattern"] = {key: rank * scale for key, rank in pattern.items()}
            pairs.divisor = scale
        modules = modules_of(student.architecture, configuration) if any(not t.own_keys for t in targets) else {}
        planned = planned_tensors(keys, targets, modules, pairs)
        if whole:
            slot = parts.slots[f"{head}#{_WHOLE}"]
            module = student.architecture.head_slot.name.removesuffix(".weight")
            kind = parts[slot.name].dtype
            planned[whole_key(module)] = Planned(slot.shape, kind, lambda: parts[slot.name])
        digest = write_tensors(planned, output.staged(ADAPTER_FILE))
    write_json(output.staged(CONFIGURATION_FILE), configuration)
    return digest


class _Pairs:
    """The pairs of a student's matrices from parts, scaled; zeros for what lies beside them in a parameter.

    Attributes:
        divisor: What B is divided by, because PEFT will multiply by it.
    """

    divisor = 1.0

    def __init__(
        self, student: Model, parts: Parts, fitted: set[str], scale: ScaleDecision, dtype: torch.dtype
    ) -> None:
        self._student, self._parts, self._fitted, self._scale, self.dtype = student, parts, fitted, scale, dtype
        self._names = {name.rpartition("#")[0] for name in parts if not name.endswith(f"#{_WHOLE}")}
        self._views = student.layout.parts_of
        self._target_of = {name: target for target in student.keys.targets.values() for name in target.names}
        self._rank_of: dict[str, int] = {}
        inside = {view.name for matrix in self._target_of for view in self._views(matrix)}
        if lost := self._names - inside - self._target_of.keys():
            meanings = student.layout.meanings
            student.keys.changed_by({meanings[name].view.matrix if name in meanings else name for name in lost})

    def changes(self, target: Target) -> bool:
        """Whether a part has a pair of any matrix of a parameter."""
        return any(self._own_rank(name) for name in target.names)

    def rank(self, name: str) -> int:
        """The rank of a matrix's pair: the largest of those that have to be alike, because experts share one pair."""
        if name not in self._rank_of:
            target = self._target_of[name]
            begin_of = {matrix.name: matrix.piece.begin for matrix in target.matrices}
            alike = [other for other in target.names if begin_of.get(other) == begin_of.get(name)]
            others = target.names if not any(map(self._own_rank, alike)) else alike
            largest = max(1, *map(self._own_rank, others))
            self._rank_of |= dict.fromkeys(alike, largest)
        return self._rank_of[name]

    def factors(self, name: str) -> Factors:
        """``(B, A)`` of a matrix as it is to be stored."""
        target, rank = self._target_of[name], self.rank(name)
        if name in self._names:
            right, left = self._parts[f"{name}#A"], self._parts[f"{name}#B"]
            if target.embedding:  # kept transposed, as PEFT does
                left, right = right.T, left.T
        else:
            left, right = self._joined(name)
        factor = 1.0 if f"{name}#B" in self._fitted else self._scale.scales.get(group_of(target.parameter), 1.0)
        left = left * (factor / self.divisor) if factor != self.divisor else left
        return _padded(left, 1, rank).to(self.dtype), _padded(right, 0, rank).to(self.dtype)

    def _joined(self, name: str) -> Factors:
        """The pairs of the parts of a matrix as one: their rows in their places, their ranks beside each other."""
        import torch

        out, width = self._student.architecture.by_name[name].shape
        lefts, rights = [torch.zeros(out, 0, dtype=self.dtype)], [torch.zeros(0, width, dtype=self.dtype)]
        for view in self._views(name):
            if view.name in self._names:
                own = self._parts[f"{view.name}#B"]
                left = torch.zeros(out, own.shape[1], dtype=own.dtype)
                view.rows_of(left).copy_(own)
                lefts.append(left)
                rights.append(self._parts[f"{view.name}#A"])
        return torch.cat(lefts, dim=1), torch.cat(rights)

    def _own_rank(self, name: str) -> int:
        if name in self._names:
            return self._parts.slots[f"{name}#A"].shape[0]
        inside = [view.name for view in self._views(name) if view.name in self._names]
        return sum(self._parts.slots[f"{part}#A"].shape[0] for part in inside)


def _padded(factor: Tensor, dimension: int, rank: int) -> Tensor:
    import torch

    lacking = rank - factor.shape[dimension]
    if not lacking:
        return factor
    return torch.nn.functional.pad(factor, (0, lacking) if dimension == 1 else (0, 0, 0, lacking))


def write_head_part(folder: Path, pair: ModelPair, recipe: Recipe, fitted: StageResult, alone: bool) -> Path:
    """The part of what was fitted: pairs of the layers, and the head as a LoRA pair or whole.

    Args:
        folder: Where parts lie.
        pair: Teacher and student.
        recipe: What is asked for.
        fitted: The head.
        alone: Whether nothing else is in the adapter. PEFT loads no adapter without any pair, so a head saved whole
            then gets the company of a pair of zeros.
    """
    import torch

    student, architecture = pair.student, pair.student.architecture
    name = architecture.head
    tensors: dict[str, torch.Tensor] = {}
    if fitted.head is not None:
        assert fitted.head_delta is not None
        left, right = fitted.head
        rows = architecture.head_slot.shape[0] - len(left)  # some heads have rows that pad them and give no logits
        if head_is_whole(recipe, pair):
            base = student.checkpoint.read(architecture.embedding if architecture.tied else name)
            delta = torch.nn.functional.pad(fitted.head_delta, (0, 0, 0, rows))
            tensors = {f"{name}#{_WHOLE}": (base.float() + delta).to(base.dtype)}
            if alone and not fitted.pairs:
                tensors |= _zero_pair(student, getattr(torch, recipe.dtype))
        else:
            tensors = {f"{name}#A": right, f"{name}#B": torch.nn.functional.pad(left, (0, 0, 0, rows))}
    for matrix, (left, right) in fitted.pairs.items():
        tensors |= {f"{matrix}#A": right, f"{matrix}#B": left}
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    record = {"label": "fitted head", "layer": None}
    return write_part(folder, f"head-{digest.hexdigest()[:32]}", tensors, record)


def asked_head_rank(recipe: Recipe, head: str) -> HeadRank:
    """The rank asked for the fitted head: the last matching pattern's, else the head's."""
    matching = [rank for pattern, rank in recipe.ranks.items() if fnmatchcase(head, pattern)]
    return matching[-1] if matching else recipe.head_rank


def head_is_whole(recipe: Recipe, pair: ModelPair) -> bool:
    """Whether the fitted head is saved whole."""
    tied = pair.student.architecture.tied
    return recipe.head_format == "whole" or (recipe.head_format == "auto" and tied)


def base_model(recipe: Recipe, pair: ModelPair) -> str:
    """What adapter_config.json names as the base: the student, or the checkpoint that a GGUF file was made from.

    Raises:
        UsageError: The file does not say that, and neither does the recipe.
    """
    checkpoint = pair.student.checkpoint
    source = checkpoint.source
    if recipe.base_model is not None:
        return recipe.base_model
    if checkpoint.is_gguf:
        if checkpoint.origin is None:
            raise UsageError(
                f"{source} does not say which checkpoint of the hub it was made from, and the adapter is for that "
                "(expected general.source or general.base_model in its metadata)",
                "Name it: --base-model organisation/name",
            )
        return checkpoint.origin[0]
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else source.partition("@")[0]


def _only(part: Path, name: str) -> bool:
    """Whether a part holds pairs of this matrix and of no other."""
    return {tensor.rpartition("#")[0] for tensor in read_header(part).tensors} == {name}


def _zero_pair(student: Model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    import torch

    name, matrix = next(iter(student.keys.matrices().items()))
    rows, columns = matrix.shape
    return {f"{name}#A": torch.zeros(1, columns, dtype=dtype), f"{name}#B": torch.zeros(rows, 1, dtype=dtype)}
