"""Pairs everything of the student with the teacher and cuts the work into units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.pairing.unit import ExpertLayer, Layers, Norm, TensorTask, UnitOfWork, WeightedView, map_depth
from moe_svd_distill.recipe import Recipe
from moe_svd_distill.roles import ROLES, Meaning, ModelLayout

_T = TypeVar("_T")
BYTES_PER_ENTRY = 2
RELATED_EMBEDDINGS = 0.5  # mean cosine of embedding rows; unrelated models are near 0
EXPERTS = ("experts.gate", "experts.up", "experts.down")
LATENT, GATED, PLAIN, OTHER = (
    "latent attention",
    "attention with a gated output",
    "attention",
    "no attention known here",
)


@dataclass(frozen=True)
class Pairing:
    """All the work of a run.

    Attributes:
        units: The units, in order of the student's layers.
        depth: Student layer to teacher layers.
        unused_teacher: What of the teacher nothing is made from, with the reason.
        ignored_student: Student tensor to the reason why it is left out.
        notes: What else a reader should know of the pair.
    """

    units: tuple[UnitOfWork, ...]
    depth: tuple[Layers, ...]
    unused_teacher: Mapping[str, str]
    ignored_student: Mapping[str, str]
    notes: tuple[str, ...] = ()


def pair_models(
    teacher: ModelLayout,
    student: ModelLayout,
    recipe: Recipe,
    *,
    embedding_similarity: float | None = None,
    reason_against: Callable[[str], str] = lambda matrix: "",
) -> Pairing:
    """Pair the models.

    Args:
        teacher: The teacher's tensors and what they mean.
        student: The student's.
        recipe: What is asked for.
        embedding_similarity: Mean cosine of the embedding rows of teacher and student; None where shapes differ.
        reason_against: Matrix of the student to why no adapter can change it; empty where one can.

    Raises:
        IncompatiblePairError: Nothing of the student has a counterpart in the teacher.
        UsageError: The recipe's depth map does not fit the models.
    """
    depth = map_depth(recipe.depth_map, student.geometry.layers, teacher.geometry.layers)
    pairer = _Pairer(teacher, student, recipe, embedding_similarity, reason_against)
    units = [pairer.layer_unit(layer, behind) for layer, behind in enumerate(depth)]
    units += [pairer.ends_unit("embeddings", ("embedding",)), pairer.ends_unit("head", ("norm.final", "head"))]
    units = [unit for unit in units if unit.tasks]
    if not any(task.change for unit in units for task in unit.tasks):
        reasons = sorted({task.reason for unit in units for task in unit.tasks}) or sorted(
            set(student.without_role.values())
        )
        raise IncompatiblePairError(
            f"no tensor of the student can be made from the teacher: {'; '.join(reasons[:3])}",
            "Choose a teacher of a related architecture",
        )
    left_out = {**student.ignored, **_no_role(student)}
    return Pairing(tuple(units), depth, _unused(teacher, units), left_out, _notes(teacher, student))


class _Pairer:
    """Looks matrices up in both models while the units are put together."""

    def __init__(
        self,
        teacher: ModelLayout,
        student: ModelLayout,
        recipe: Recipe,
        embedding_similarity: float | None,
        reason_against: Callable[[str], str],
    ) -> None:
        self.teacher, self.student, self.recipe = teacher, student, recipe
        self.embedding_similarity, self.reason_against = embedding_similarity, reason_against
        self.of_layer: dict[int | None, list[Meaning]] = {}
        for meaning in student.meanings.values():
            self.of_layer.setdefault(meaning.layer, []).append(meaning)

    def layer_unit(self, layer: int, behind: Layers) -> UnitOfWork:
        meanings = sorted(self.of_layer.get(layer, []), key=_order)
        return self._unit(f"layer {layer}", layer, behind, meanings)

    def ends_unit(self, label: str, roles: tuple[str, ...]) -> UnitOfWork:
        """Unit of what stands outside the layers; a vector without a place among the roles goes with the head."""
        ends = self.of_layer.get(None, [])
        own = [m for m in ends if m.role in roles or (label == "head" and m.role != "embedding")]
        return self._unit(label, None, (), own)

    def _unit(self, label: str, layer: int | None, behind: Layers, meanings: Sequence[Meaning]) -> UnitOfWork:
        experts = self._teacher_experts(behind)
        tasks = tuple(self._task(meaning, behind, experts) for meaning in meanings)
        norms = self._norms(layer, behind, {task.role: task.shape[1] for task in tasks if task.change})
        ends = self.teacher.find("embedding"), self.student.find("embedding")
        embeddings = (ends[0], ends[1]) if ends[0] and ends[1] else None
        return UnitOfWork(label, layer, behind, tasks, norms, experts, embeddings, self._cost(tasks, experts))

    def _task(self, meaning: Meaning, layers: Layers, experts: tuple[ExpertLayer, ...]) -> TensorTask:
        routed = meaning.role in EXPERTS
        sources = () if routed or not meaning.is_matrix else self._sources(meaning.role, layers, meaning.layer)
        reason = self._reason_to_keep(meaning, sources, layers, experts)
        rank = 0
        if meaning.is_matrix:
            rank = self.recipe.rank_of(meaning.view.name, meaning.role, (meaning.shape[0], meaning.shape[1]))
        return TensorTask(meaning.view, meaning.role, meaning.expert, meaning.shape, sources, not reason, rank, reason)

    def _reason_to_keep(
        self, meaning: Meaning, sources: tuple[WeightedView, ...], layers: Layers, experts: tuple[ExpertLayer, ...]
    ) -> str:
        role = meaning.role
        if not meaning.is_matrix:
            return _cannot_carry(role, self.recipe.norms, self._same_width())
        if reason := self.reason_against(meaning.view.matrix):
            return reason
        if role == "embedding" and (reason := self._reason_to_keep_embeddings()):
            return reason
        if role == "head" and self.recipe.head == "keep":
            return "recipe: head: keep"
        if role in ("head", "embedding"):
            if self.student.geometry.tied_embeddings:
                return "head and embeddings are tied in the student: no adapter is right both merged and unmerged"
            if self.teacher.geometry.vocabulary != self.student.geometry.vocabulary:
                return "teacher and student have different vocabulary sizes"
        where = f"teacher layer {' and '.join(str(layer) for layer, _ in layers)}" if layers else "the teacher"
        if role in EXPERTS or role == "router":
            if experts and not all(self.student.find(kind, meaning.layer, 0) for kind in EXPERTS):
                return "the student's experts are not gate, up and down"
            return "" if experts else f"{where} has no routed experts"
        if role.startswith("attention.") and not sources and meaning.layer is not None:
            own = _attention(self.student, meaning.layer)
            others = dict.fromkeys(_attention(self.teacher, layer) for layer, _ in layers)
            if own not in others:
                return f"{where} has {' and '.join(others)}, this layer {own}"
        return "" if sources else f"{where} has no {role}"

    def _reason_to_keep_embeddings(self) -> str:
        if self.recipe.embeddings == "keep":
            return "recipe: embeddings: keep"
        if self.recipe.embeddings == "delta":
            return ""
        if self.embedding_similarity is None:
            return "embeddings of different shapes are not related"
        if self.embedding_similarity < RELATED_EMBEDDINGS:
            return f"the embeddings are not related: mean cosine {self.embedding_similarity:.2f}"
        return "" if self.embedding_similarity < 1.0 else "the embeddings are identical"

    def _same_width(self) -> bool:
        return self.teacher.geometry.hidden == self.student.geometry.hidden

    def _sources(self, role: str, layers: Layers, student_layer: int | None) -> tuple[WeightedView, ...]:
        """What stands behind a role: in one or two layers of the teacher, and of the same kind of attention."""
        if not layers:
            name = self.teacher.find(role)
            if name is None and role == "head" and self.teacher.geometry.tied_embeddings:
                name = self.teacher.find("embedding")
            return (WeightedView(self.teacher.meanings[name].view, 1.0),) if name else ()
        if role.startswith("attention.") and student_layer is not None:
            own = _attention(self.student, student_layer)
            layers = tuple((layer, weight) for layer, weight in layers if _attention(self.teacher, layer) == own)
        found = [(self._counterpart(role, layer), weight) for layer, weight in layers]
        present = [(self.teacher.meanings[name], weight) for name, weight in found if name is not None]
        if len({meaning.shape for meaning, _ in present}) > 1:
            present = [max(present, key=lambda pair: pair[1])]
        return tuple(WeightedView(meaning.view, weight) for meaning, weight in _summing_to_one(present))

    def _counterpart(self, role: str, layer: int) -> str | None:
        """The teacher's tensor of a role; for a dense MLP, where there is none, the shared expert's."""
        shared = role.replace("dense.", "shared.") if role.startswith("dense.") else role
        return self.teacher.find(role, layer) or self.teacher.find(shared, layer)

    def _teacher_experts(self, layers: Layers) -> tuple[ExpertLayer, ...]:
        present = [(layer, weight) for layer, weight in layers if self._has_experts(layer)]
        found = tuple(self._expert_layer(layer, weight) for layer, weight in _summing_to_one(present))
        if len({(layer.shapes, len(layer.tensors)) for layer in found}) > 1:
            nearest = max(present, key=lambda pair: pair[1])[0]
            found = (self._expert_layer(nearest, 1.0),)
        return found

    def _has_experts(self, layer: int) -> bool:
        whole = all(self.teacher.find(role, layer, 0) for role in EXPERTS)
        return whole and self.teacher.find("router", layer) is not None

    def _expert_layer(self, layer: int, weight: float) -> ExpertLayer:
        meanings, place = self.teacher.meanings, self.teacher.by_place
        gate, up, down = (
            [meanings[place[role, layer, expert]] for expert in range(self.teacher.experts_at(layer))]
            for role in EXPERTS
        )
        tensors = tuple((g.view, u.view, d.view) for g, u, d in zip(gate, up, down, strict=True))
        router = meanings[place["router", layer, None]].view
        return ExpertLayer(layer, weight, router, tensors, (gate[0].shape, up[0].shape, down[0].shape))

    def _norms(self, layer: int | None, layers: Layers, columns: Mapping[str, int]) -> tuple[Norm, ...]:
        """What feeds the roles in both models, where gains can be folded: in the same coordinates."""
        found = []
        for role, width in sorted(columns.items()):
            own = next((m for norm in ROLES[role].norms if (m := self._norm(self.student, norm, layer))), None)
            behind = [
                (next((m for norm in ROLES[role].norms if (m := self._norm(self.teacher, norm, where))), None), weight)
                for where, weight in (layers or ((None, 1.0),))
            ]
            present = [(m.view, weight) for m, weight in behind if own and m and m.shape == own.shape]
            if own and present and own.shape == (width,):
                sources = tuple(WeightedView(view, weight) for view, weight in _summing_to_one(present))
                offsets = (self.teacher.gain_offset, self.student.gain_offset)
                found.append(Norm(role, own.view, sources, offsets))
        return tuple(found)

    @staticmethod
    def _norm(model: ModelLayout, role: str, layer: int | None) -> Meaning | None:
        name = model.find(role, layer)
        return None if name is None else model.meanings[name]

    def _cost(self, tasks: tuple[TensorTask, ...], experts: tuple[ExpertLayer, ...]) -> int:
        entries = sum(prod(task.shape) for task in tasks)
        shapes = self.teacher.meanings
        entries += sum(prod(shapes[source.view.name].shape) for task in tasks for source in task.sources)
        entries += sum(prod(shape) * len(layer.tensors) for layer in experts for shape in layer.shapes)
        return entries * BYTES_PER_ENTRY


def _summing_to_one(weighted: Sequence[tuple[_T, float]]) -> list[tuple[_T, float]]:
    total = sum(weight for _, weight in weighted)
    return [(value, weight / total) for value, weight in weighted]


def _attention(model: ModelLayout, layer: int) -> str:
    """The kind of attention of a layer: matrices of different kinds do not correspond, whatever their names."""
    if model.find("attention.kv_b", layer):
        return LATENT
    if model.find("attention.gated_q", layer):
        return GATED
    return PLAIN if model.find("attention.q", layer) else OTHER


def _cannot_carry(role: str, norms: str, same_width: bool) -> str:
    if role in ("norm.attention", "norm.mlp", "norm.experts", "norm.router", "norm.final") and norms == "fold":
        if same_width:
            return "no LoRA can carry a norm; the teacher's gain is multiplied into the weights that read it"
        return "no LoRA can carry a norm; widths differ, so the teacher's gain is left out"
    if role == "router.correction_bias":
        return "no LoRA can carry the router's correction bias"
    return f"no LoRA can carry a {'norm' if 'norm' in role else 'bias'}"


def _order(meaning: Meaning) -> tuple[str, int]:
    return (meaning.role, -1 if meaning.expert is None else meaning.expert)


def _no_role(model: ModelLayout) -> dict[str, str]:
    return {name: f"not paired: {reason}" for name, reason in model.without_role.items()}


def _unused(teacher: ModelLayout, units: Iterable[UnitOfWork]) -> dict[str, str]:
    used: set[str] = set()
    for unit in units:
        used |= {source.view.name for task in unit.tasks if task.change for source in task.sources}
        used |= {source.view.name for norm in unit.norms for source in norm.sources}
        if any(task.change and task.role in EXPERTS for task in unit.tasks):
            for layer in unit.teacher_experts:
                used |= {layer.router.name, *(view.name for views in layer.tensors for view in views)}
    unused = {
        name: "no student tensor is made from it" if meaning.is_matrix else "no LoRA can carry it"
        for name, meaning in teacher.meanings.items()
        if name not in used
    }
    return {**unused, **teacher.ignored, **_no_role(teacher)}


def _notes(teacher: ModelLayout, student: ModelLayout) -> tuple[str, ...]:
    if teacher.activation and student.activation and teacher.activation != student.activation:
        return (
            f"the MLPs of the teacher compute {teacher.activation}, those of the student {student.activation}: their "
            "weights are transferred all the same",
        )
    return ()
