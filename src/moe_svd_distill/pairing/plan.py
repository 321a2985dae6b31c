"""Pairs every student tensor with the teacher and cuts the work into units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.families import Carrier, Meaning, ModelLayout
from moe_svd_distill.pairing.depth import LayerBlend, map_depth
from moe_svd_distill.pairing.unit import ExpertLayer, Source, TensorTask, UnitOfWork
from moe_svd_distill.recipe import Recipe

Shapes = Mapping[str, tuple[int, ...]]
BYTES_PER_ENTRY = 2
RELATED = 0.5  # mean cosine of embedding rows; unrelated models are near 0


@dataclass(frozen=True)
class Plan:
    """All the work of a run.

    Attributes:
        units: The units, in order of the student's layers.
        depth: Student layer to teacher layers.
        unused_teacher: Teacher tensor to the reason why nothing is made from it.
        ignored_student: Student tensor to the reason why it is left out.
    """

    units: tuple[UnitOfWork, ...]
    depth: tuple[LayerBlend, ...]
    unused_teacher: Mapping[str, str]
    ignored_student: Mapping[str, str]


def make_plan(
    teacher: ModelLayout,
    student: ModelLayout,
    teacher_shapes: Shapes,
    student_shapes: Shapes,
    recipe: Recipe,
    *,
    embedding_similarity: float | None = None,
) -> Plan:
    """Pair the models.

    Args:
        teacher: The teacher's tensors and what they mean.
        student: The student's.
        teacher_shapes: Hub name to shape.
        student_shapes: The same of the student.
        recipe: What is asked for.
        embedding_similarity: Mean cosine of the embedding rows of teacher and student; None where shapes differ.

    Raises:
        IncompatiblePairError: No student tensor has a counterpart in the teacher.
        UsageError: The recipe's depth map does not fit the models.
    """
    depth = map_depth(recipe.depth_map, student.geometry.layers, teacher.geometry.layers)
    pairing = _Pairing(teacher, student, teacher_shapes, student_shapes, recipe, embedding_similarity)
    units = [pairing.layer_unit(blend) for blend in depth]
    units += [pairing.ends_unit("embeddings", ("embedding",)), pairing.ends_unit("head", ("norm.final", "head"))]
    units = _complete_pairs([unit for unit in units if unit.tasks], student)
    if not any(task.change for unit in units for task in unit.tasks):
        reasons = sorted({task.reason for unit in units for task in unit.tasks})
        raise IncompatiblePairError(
            f"no tensor of the student can be made from the teacher: {'; '.join(reasons[:3])}",
            "Choose a teacher of a related architecture",
        )
    unknown = dict.fromkeys(student.unknown, f"not known in the family {student.family.model_type}")
    return Plan(tuple(units), depth, _unused(teacher, units), {**student.ignored, **unknown})


class _Pairing:
    """Looks tensors up in both models while the units are put together."""

    def __init__(
        self,
        teacher: ModelLayout,
        student: ModelLayout,
        teacher_shapes: Shapes,
        student_shapes: Shapes,
        recipe: Recipe,
        embedding_similarity: float | None,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.teacher_shapes = teacher_shapes
        self.student_shapes = student_shapes
        self.recipe = recipe
        self.embedding_similarity = embedding_similarity

    def layer_unit(self, blend: LayerBlend) -> UnitOfWork:
        meanings = [m for m in self.student.meanings.values() if m.layer == blend.student]
        experts = self._teacher_experts(blend.teacher)
        tasks = tuple(self._task(meaning, blend.teacher, experts) for meaning in sorted(meanings, key=_order))
        norms = self._norms(meanings, blend.teacher)
        label = f"layer {blend.student}"
        return UnitOfWork(label, blend.student, blend.teacher, tasks, norms, experts, self._cost(tasks, experts))

    def ends_unit(self, label: str, roles: tuple[str, ...]) -> UnitOfWork:
        meanings = [m for m in self.student.meanings.values() if m.role.role in roles]
        tasks = tuple(self._task(meaning, (), ()) for meaning in meanings)
        return UnitOfWork(label, None, (), tasks, self._norms(meanings, ()), (), self._cost(tasks, ()))

    def _task(
        self, meaning: Meaning, layers: tuple[tuple[int, float], ...], experts: tuple[ExpertLayer, ...]
    ) -> TensorTask:
        shape = self.student_shapes[meaning.name]
        routed = meaning.role.role.startswith("experts.")
        sources = () if routed else self._sources(meaning.role.role, layers)
        reason = self._reason_to_keep(meaning, sources, layers, experts)
        rank = 0
        if meaning.role.carrier is not Carrier.NONE and len(shape) == 2:
            rank = self.recipe.rank_of(meaning.name, meaning.role.role, (shape[0], shape[1]))
        return TensorTask(
            meaning.name, meaning.role.role, meaning.expert, shape, sources, not reason, not reason, rank, reason
        )

    def _reason_to_keep(
        self,
        meaning: Meaning,
        sources: tuple[Source, ...],
        layers: tuple[tuple[int, float], ...],
        experts: tuple[ExpertLayer, ...],
    ) -> str:
        role = meaning.role.role
        if meaning.role.carrier is Carrier.NONE:
            return _cannot_carry(role, self.recipe.norms, self._same_width())
        if role == "embedding" and (reason := self._reason_to_keep_embeddings()):
            return reason
        if role == "head" and self.recipe.head == "keep":
            return "recipe: head: keep"
        if role in ("head", "embedding") and self.student.geometry.tied_embeddings:
            return "head and embeddings are tied in the student: no adapter is right both merged and unmerged"
        if role in ("head", "embedding") and not self._same_vocabulary_size(sources):
            return "teacher and student have different vocabulary sizes"
        where = f"teacher layer {' and '.join(str(layer) for layer, _ in layers)}" if layers else "the teacher"
        if role.startswith("experts.") or role == "router":
            return "" if experts else f"{where} has no routed experts"
        return "" if sources else f"{where} has no {role}"

    def _reason_to_keep_embeddings(self) -> str:
        if self.recipe.embeddings == "keep":
            return "recipe: embeddings: keep"
        if self.recipe.embeddings == "delta":
            return ""
        if self.embedding_similarity is None:
            return "embeddings of different shapes are not related"
        if self.embedding_similarity < RELATED:
            return f"the embeddings are not related: mean cosine {self.embedding_similarity:.2f}"
        return "" if self.embedding_similarity < 1.0 else "the embeddings are identical"

    def _same_width(self) -> bool:
        return self.teacher.geometry.hidden == self.student.geometry.hidden

    def _same_vocabulary_size(self, sources: tuple[Source, ...]) -> bool:
        own = self.student.geometry.vocabulary
        return all(self.teacher_shapes[source.name][0] == own for source in sources)

    def _sources(self, role: str, layers: tuple[tuple[int, float], ...]) -> tuple[Source, ...]:
        if not layers:
            name = self.teacher.find(role)
            if name is None and role == "head" and self.teacher.geometry.tied_embeddings:
                name = self.teacher.find("embedding")
            return (Source(name, 1.0),) if name else ()
        found = [(self.teacher.find(role, layer), weight) for layer, weight in layers]
        present = [(name, weight) for name, weight in found if name is not None]
        if len({self.teacher_shapes[name] for name, _ in present}) > 1:
            present = [max(present, key=lambda pair: pair[1])]
        total = sum(weight for _, weight in present)
        return tuple(Source(name, weight / total) for name, weight in present)

    def _teacher_experts(self, layers: tuple[tuple[int, float], ...]) -> tuple[ExpertLayer, ...]:
        present = [(layer, weight) for layer, weight in layers if self.teacher.experts_at(layer)]
        total = sum(weight for _, weight in present)
        return tuple(self._expert_layer(layer, weight / total) for layer, weight in present)

    def _expert_layer(self, layer: int, weight: float) -> ExpertLayer:
        place = self.teacher.by_place
        tensors = tuple(
            (
                place["experts.gate", layer, expert],
                place["experts.up", layer, expert],
                place["experts.down", layer, expert],
            )
            for expert in range(self.teacher.experts_at(layer))
        )
        return ExpertLayer(layer, weight, place["router", layer, None], tensors)

    def _norms(
        self, meanings: Iterable[Meaning], layers: tuple[tuple[int, float], ...]
    ) -> tuple[tuple[str, str, tuple[Source, ...]], ...]:
        norms = [m for m in meanings if m.role.role in ("norm.attention", "norm.mlp", "norm.final")]
        return tuple((m.role.role, m.name, self._sources(m.role.role, layers)) for m in norms)

    def _cost(self, tasks: tuple[TensorTask, ...], experts: tuple[ExpertLayer, ...]) -> int:
        entries = sum(prod(task.shape) for task in tasks)
        entries += sum(prod(self.teacher_shapes[s.name]) for task in tasks for s in task.sources)
        entries += sum(prod(self.teacher_shapes[n]) for layer in experts for names in layer.tensors for n in names)
        return entries * BYTES_PER_ENTRY


def _complete_pairs(units: list[UnitOfWork], student: ModelLayout) -> list[UnitOfWork]:
    """Give a pair of zeros to every kept tensor of a class that is changed elsewhere."""
    from dataclasses import replace

    def target(task: TensorTask) -> str:
        return student.meanings[task.name].role.target

    targets = {target(task) for unit in units for task in unit.tasks if task.pair}
    completed = []
    for unit in units:
        tasks = tuple(
            replace(task, pair=True) if not task.pair and target(task) in targets else task for task in unit.tasks
        )
        completed.append(replace(unit, tasks=tasks))
    return completed


def _cannot_carry(role: str, norms: str, same_width: bool) -> str:
    if role in ("norm.attention", "norm.mlp", "norm.final") and norms == "fold":
        if same_width:
            return "no LoRA can carry a norm; the teacher's gain is folded into the weights that read it"
        return "no LoRA can carry a norm; widths differ, so the teacher's gain is not folded"
    if role == "router.correction_bias":
        return "no LoRA can carry the router's correction bias"
    return f"no LoRA can carry a {'norm' if 'norm' in role else 'bias'}"


def _order(meaning: Meaning) -> tuple[str, int]:
    return (meaning.role.role, -1 if meaning.expert is None else meaning.expert)


def _unused(teacher: ModelLayout, units: Iterable[UnitOfWork]) -> dict[str, str]:
    used: set[str] = set()
    for unit in units:
        used |= {source.name for task in unit.tasks if task.change for source in task.sources}
        used |= {source.name for _, _, sources in unit.norms for source in sources}
        for layer in unit.teacher_experts:
            used |= {layer.router, *(name for names in layer.tensors for name in names)}
    unused = {name: _unused_reason(meaning) for name, meaning in teacher.meanings.items() if name not in used}
    unknown = dict.fromkeys(teacher.unknown, f"not known in the family {teacher.family.model_type}")
    return {**unused, **teacher.ignored, **unknown}


def _unused_reason(meaning: Meaning) -> str:
    if meaning.role.carrier is Carrier.NONE:
        return "no LoRA can carry it"
    return "no student tensor is made from it"
