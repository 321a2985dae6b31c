"""Sampling matching tensors of two models: the ends first, which say where the channels are, then layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from moe_svd_distill.errors import DistillError
from moe_svd_distill.files.dtypes import FLOATS
from moe_svd_distill.pairing.lineage import ENDS, Comparison, Probe, Vocabularies, VocabularyRelation
from moe_svd_distill.pairing.unit import map_depth
from moe_svd_distill.pipeline.pair import ModelPair
from moe_svd_distill.pipeline.sampling import RowSampler, spread_rows
from moe_svd_distill.roles import ROLES, Axis, TensorView

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.algebra.similarity import Similarity

Views: TypeAlias = tuple[TensorView, TensorView]
"""A tensor of the teacher and one of the student."""
MIB = 1024 * 1024
ALLOWANCE = {"embedding": 16 * MIB, "head": 12 * MIB}  # with the following two: 64 MiB of each model
BODY_ALLOWANCE = 28 * MIB
CONFIRMATION = 8 * MIB
END_ROWS = 1024  # tokens
BODY_ROWS = 64  # rows of the student that are compared or looked for
LEAST_TOKENS = 32
TESTED_CHANNELS = 256  # looked for before all are
# One role of each kind says enough; norm gains are alike in all models and say nothing.
PREFERRED = ("attention.q", "attention.k", "router", "experts.gate", "dense.gate", "shared.gate")
MOST_ROLES = 5
DOUBLE = frozenset({"attention.k", "router"})  # small tensors, read whole if possible and searched for moved rows


def probe_pair(
    pair: ModelPair, vocabulary: VocabularyRelation, *, same_shape: bool
) -> tuple[tuple[Probe, ...], tuple[str, ...], bool, tuple[int, int]]:
    """Measure everything there is to measure within the budget.

    Args:
        pair: Teacher and student.
        vocabulary: Which token numbers mean the same.
        same_shape: Whether to look for identical weights at all.

    Returns:
        The measurements; what was not measured, and why; whether every tensor has its counterpart and a row of each is
        identical in both; and the bytes read of teacher and student.
    """
    run = _Probing(pair, vocabulary)
    run.probe_ends()
    run.probe_layers()
    alike = same_shape and bool(run.probes) and all(probe.identical for probe in run.probes)
    alike = alike and run.attempt("whether all weights are the same", run.all_alike) is True
    return tuple(run.probes), tuple(run.skipped), alike, (run.teacher.bytes_read, run.student.bytes_read)


class _Probing:
    def __init__(self, pair: ModelPair, vocabulary: VocabularyRelation) -> None:
        self.pair, self.vocabulary = pair, vocabulary
        self.teacher, self.student = RowSampler(pair.teacher), RowSampler(pair.student)
        self.probes: list[Probe] = []
        self.skipped: list[str] = []
        self.experts: dict[tuple[int, int], int] = {}  # by layers: the teacher's expert behind the student's first
        self.channels: Tensor | None = None  # teacher channel of each student channel; None: where they stand

    def probe_ends(self) -> None:
        """Embedding and head: rows of the same tokens, and channels looked for where rows do not agree."""
        tokens = self._tokens()
        flat: dict[str, tuple[Tensor, Tensor]] = {}
        for role in sorted(ENDS):
            names = self.pair.teacher.layout.view(role), self.pair.student.layout.view(role)
            if names[0] is None or names[1] is None:
                self.skipped.append(f"{role}: not in both models")
            elif len(tokens) < LEAST_TOKENS:
                self.skipped.append(f"{role}: only {len(tokens)} tokens are known to mean the same in both")
            else:
                self.attempt(role, self._probe_end, role, *names, tokens, flat)
        related = [role for role in flat if self._related(role, Comparison.CHANNELS)]
        if related and not any(self._related(role, Comparison.IN_PLACE) for role in ENDS):
            from moe_svd_distill.algebra.similarity import match_channels

            self.channels = match_channels(*flat[related[0]])[0]

    def _tokens(self) -> list[tuple[int, int]]:
        """Numbers of the same token in teacher and student."""
        if self.vocabulary.kind is not Vocabularies.DIFFERENT:
            if self.vocabulary.kind is Vocabularies.UNKNOWN:
                self.skipped.append("vocabularies: unknown, so rows of the same number were taken for the same token")
            return [(number, number) for number in range(self.vocabulary.shared)]
        from moe_svd_distill.calibration.vocabulary import common_tokens

        folders = (self.pair.teacher.checkpoint.folder, self.pair.student.checkpoint.folder)
        limits = (self.pair.teacher.layout.geometry.vocabulary, self.pair.student.layout.geometry.vocabulary)
        try:
            student, teacher = common_tokens(*folders)
        except DistillError as error:
            self.skipped.append(f"tokens that both have: {error.what}")
            return []
        both = zip(teacher.tolist(), student.tolist(), strict=True)
        return [(left, right) for left, right in both if left < limits[0] and right < limits[1]]

    def _probe_end(
        self,
        role: str,
        teacher: TensorView,
        student: TensorView,
        tokens: list[tuple[int, int]],
        flat: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        from moe_svd_distill.algebra.similarity import flattened, match_channels, row_similarity

        row_bytes = max(self.teacher.row_bytes(teacher), self.student.row_bytes(student))
        wanted = max(LEAST_TOKENS, min(END_ROWS, ALLOWANCE[role] // row_bytes))
        chosen = [tokens[place] for place in spread_rows(len(tokens), wanted, row_bytes)]
        left = self.teacher.rows(teacher, [token for token, _ in chosen])
        right = self.student.rows(student, [token for _, token in chosen])
        if left.shape == right.shape:
            self._add(role, (teacher, student), Comparison.IN_PLACE, (left, right), row_similarity(left, right))
            if self.probes[-1].related:
                return
        flat[role] = flattened(left), flattened(right)
        tested = flat[role][1][:, :: max(1, right.shape[1] // TESTED_CHANNELS)]
        matched = match_channels(flat[role][0], tested)[1]
        self._add(role, (teacher, student), Comparison.CHANNELS, (left, right), matched)

    def probe_layers(self) -> None:
        """The same roles at the first, the middle and the last layer of the student, each with the teacher's nearest.

        Where several teacher layers come into question, the probes of the most similar one are kept.
        """
        layouts = (self.pair.teacher.layout, self.pair.student.layout)
        widths = (layouts[0].geometry.hidden, layouts[1].geometry.hidden)
        if not all(layout.geometry.layers for layout in layouts):
            self.skipped.append("layers: no list of decoder layers is known in both models")
            return
        if widths[0] != widths[1] and self.channels is None:
            self.skipped.append("layers: the widths differ, and no hidden dimension of one was found in the other")
            return
        candidates = self._candidates()
        share = BODY_ALLOWANCE // sum(map(len, candidates.values()))
        for student_layer, teacher_layers in candidates.items():
            tried = [self._probe_layer(layer, student_layer, share) for layer in teacher_layers]
            self.probes += max(tried, key=lambda probes: sum(probe.above_chance for probe in probes))

    def _candidates(self) -> dict[int, list[int]]:
        """The first, the middle and the last student layer, each with the teacher layers it may have come from.

        Models cropped in depth keep either evenly spread layers, the first and the last among them, or those at equal
        relative depth; where neither is so, the first layer and the ends still speak.
        """
        layers, teacher_layers = (m.layout.geometry.layers for m in (self.pair.student, self.pair.teacher))
        maps = [map_depth(name, layers, teacher_layers) for name in ("endpoints", "linear")]
        nearest = [[max(behind, key=lambda part: part[1])[0] for behind in layers_behind] for layers_behind in maps]
        chosen = dict.fromkeys((0, layers // 2, layers - 1))
        return {layer: list(dict.fromkeys(found[layer] for found in nearest)) for layer in chosen}

    def _probe_layer(self, teacher_layer: int, student_layer: int, allowance: int) -> list[Probe]:
        """The probes of one pair of layers, taken out of ``probes``."""
        before = len(self.probes)
        for role, share in self._roles(teacher_layer, student_layer, allowance):
            self.attempt(
                f"{role} of layer {student_layer}", self._probe_role, role, teacher_layer, student_layer, share
            )
        found = self.probes[before:]
        del self.probes[before:]
        return found

    def _roles(self, teacher_layer: int, student_layer: int, allowance: int) -> list[tuple[str, int]]:
        """Roles that both layers have and that read the residual stream, each with its share of the bytes."""
        teacher, student = self.pair.teacher.layout, self.pair.student.layout
        known = [
            role
            for role, entry in ROLES.items()
            if role not in ENDS and entry.is_matrix and entry.axes[1] is Axis.RESIDUAL
        ]
        order = [role for role in PREFERRED if role in known] + [role for role in known if role not in PREFERRED]
        roles = [
            role
            for role in order
            if teacher.find(role, teacher_layer, _expert(role))
            and (name := student.find(role, student_layer, _expert(role)))
            and student.meanings[name].shape[0] > 1
        ][:MOST_ROLES]
        shares = {role: 2 if role in DOUBLE else 1 for role in roles}
        return [(role, allowance * share // sum(shares.values())) for role, share in shares.items()]

    def _probe_role(self, role: str, teacher_layer: int, student_layer: int, allowance: int) -> None:
        expert = _expert(role)
        source = expert if expert is None else self.experts.get((teacher_layer, student_layer), expert)
        teacher = self.pair.teacher.layout.view(role, teacher_layer, source)
        student = self.pair.student.layout.view(role, student_layer, expert)
        if teacher is not None and student is not None:
            found = self._compare(role, teacher, student, allowance)
            if role == "router" and found is not None:
                self.experts[teacher_layer, student_layer] = int(found[0])

    def _compare(self, role: str, teacher: TensorView, student: TensorView, allowance: int) -> Tensor | None:
        """Compare in place and, if that shows nothing, look for moved rows; the teacher row of each, if they moved."""
        from moe_svd_distill.algebra.similarity import match_best_rows, row_similarity

        shapes = (
            self.pair.teacher.layout.meanings[teacher.name].shape,
            self.pair.student.layout.meanings[student.name].shape,
        )
        if max(self.teacher.bytes_for(teacher, 1), self.student.bytes_for(student, 1)) > allowance // 2:
            self.skipped.append(f"{student.name}: too large to read")
            return None
        row_bytes = max(self.teacher.row_bytes(teacher), self.student.row_bytes(student))
        index = spread_rows(shapes[1][0], min(BODY_ROWS, allowance // row_bytes), row_bytes)
        whole = (shapes[0][0] + len(index)) * row_bytes <= allowance  # to look for rows that moved
        right = self.student.rows(student, index)
        if shapes[0][0] == shapes[1][0] and len(index) > 1:
            left = self._in_channels(self.teacher.rows(teacher, index))
            how = Comparison.IN_PLACE if self.channels is None else Comparison.CHANNELS
            self._add(role, (teacher, student), how, (left, right), row_similarity(left, right))
            if self.probes[-1].related:
                return None
        if not whole:
            self.skipped.append(f"{student.name}: too large to look for moved rows")
            return None
        left = self._in_channels(self.teacher.rows(teacher, list(range(shapes[0][0]))))
        found, similarity = match_best_rows(left, right)
        self._add(role, (teacher, student), Comparison.ROWS, (left, right), similarity)
        return found if self.probes[-1].related else None

    def _in_channels(self, rows: Tensor) -> Tensor:
        """The columns of the teacher's rows in the student's order."""
        return rows if self.channels is None else rows[:, self.channels]

    def all_alike(self) -> bool:
        """Whether the middle row of every tensor (of one expert in each layer) is identical in both models."""
        import torch

        teacher, student = self.pair.teacher.layout, self.pair.student.layout
        if {m.role for m in teacher.meanings.values()} != {m.role for m in student.meanings.values()}:
            return False
        chosen: list[tuple[TensorView, TensorView | None]] = [
            (meaning.view, teacher.view(meaning.role, meaning.layer, meaning.expert))
            for meaning in student.meanings.values()
            if meaning.expert is None
            or meaning.expert == (meaning.layer or 0) % max(1, student.experts_at(meaning.layer or 0))
        ]
        held = self.pair.teacher.checkpoint
        chosen += [(TensorView(name), TensorView(name) if name in held else None) for name in student.without_role]
        spent = 0
        for own, other in chosen:
            shape = self.pair.student.checkpoint[own.stored].shape
            if other is None or held[other.stored].shape != shape:
                return False
            spent += self.student.bytes_for(own, 1)
            if spent > CONFIRMATION:
                self.skipped.append(f"from {own.name} on, whether tensors are identical")
                break
            dtype = self.pair.student.checkpoint[own.stored].dtype
            if not shape or dtype not in FLOATS:
                kind = f"of dtype {dtype}" if shape else "a single number"
                self.skipped.append(f"{own.name}: {kind}, not compared")
                continue
            meaning = student.meanings.get(own.name)
            middle = [(meaning.shape if meaning else shape)[0] // 2]
            if not torch.equal(self.teacher.rows(other, middle), self.student.rows(own, middle)):
                return False
        return True

    def _add(
        self, role: str, views: Views, comparison: Comparison, rows: tuple[Tensor, Tensor], found: Similarity
    ) -> None:
        import torch

        identical = comparison is Comparison.IN_PLACE and torch.equal(*rows)
        figures = (found.cosine, found.chance, found.spread)
        teacher, student = views
        self.probes.append(Probe(role, teacher.name, student.name, comparison, len(rows[1]), *figures, identical))

    def _related(self, role: str, comparison: Comparison) -> bool:
        return any(p.related for p in self.probes if p.role == role and p.comparison is comparison)

    def attempt(self, what: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """Measure, or note why not: one unreadable tensor does not hide the others."""
        try:
            return measure(*arguments)
        except DistillError as error:
            self.skipped.append(f"{what}: {error.what}")
            return None


def _expert(role: str) -> int | None:
    return 0 if role.startswith("experts.") else None
