"""Finding which neuron, expert or attention head of the teacher is which one of the student.

Every matching is one to one, at the largest total cosine similarity (Hungarian method). What it found may be chance:
the caller compares ``similarity`` with ``chance``. Models trained independently match at 0.18-0.22, a planted
permutation at nearly 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Matching:
    """Teacher item of every student item."""

    teacher_index: Int[Tensor, "p"]
    similarity: float  # mean cosine similarity of the matched pairs
    margin: float  # mean of matched similarity minus the best similarity with any other teacher item
    chance: float  # similarity expected of the best of m unrelated items, from the spread of unmatched pairs
    spread: float  # standard deviation of unmatched pairs' similarity; 0.0 where there are none

    @property
    def is_identity(self) -> bool:
        """Whether every student item is matched with the teacher item of its own number."""
        index = self.teacher_index
        return bool((index == torch.arange(index.shape[0], device=index.device)).all())

    @property
    def significance(self) -> float:
        """How far ``similarity`` lies above ``chance``, in standard deviations of an unmatched pair."""
        return (self.similarity - self.chance) / max(self.spread, 1e-6)


@dataclass(frozen=True)
class HeadMatching:
    """Teacher heads of every student head, groups of query heads kept together."""

    kv_index: Int[Tensor, "kv"]  # teacher key/value head of each student key/value head
    query_index: Int[Tensor, "heads"]  # teacher query head of each student query head, over the whole layer
    kv: Matching
    query_similarity: float  # mean cosine similarity of the matched query heads
    query_margin: float  # as in Matching, within a group; 0.0 for groups of one

    @property
    def similarity(self) -> float:
        """The less sure of the two."""
        return min(self.kv.similarity, self.query_similarity)

    @property
    def is_identity(self) -> bool:
        """Whether every head is matched with the head of its own number."""
        index = self.query_index
        return self.kv.is_identity and bool((index == torch.arange(index.shape[0], device=index.device)).all())


def match_rows(teacher: Float[Tensor, "m d"], student: Float[Tensor, "p d"]) -> Matching:
    """Rows of ``student`` to rows of ``teacher`` by cosine similarity.

    Raises:
        ValueError: more student than teacher rows, or entries that are not finite.
    """
    return match_similarity(cosine_similarity([teacher], [student]))


def match_neurons(
    teacher_gate: Float[Tensor, "i_t h"],
    teacher_up: Float[Tensor, "i_t h"],
    teacher_down: Float[Tensor, "h i_t"],
    student_gate: Float[Tensor, "i_s h"],
    student_up: Float[Tensor, "i_s h"],
    student_down: Float[Tensor, "h i_s"],
) -> Matching:
    """Neurons of a gated MLP. Each is described by its gate row, up row and down column, put one after the other.

    The three matrices are first brought to the same Frobenius norm, so that none drowns the others.

    Raises:
        ValueError: as ``match_rows``.
    """
    teacher = [teacher_gate, teacher_up, teacher_down.mT]
    student = [student_gate, student_up, student_down.mT]
    return match_similarity(cosine_similarity(teacher, student))


def match_experts(
    teacher_router: Float[Tensor, "e_t h"],
    student_router: Float[Tensor, "e_s h"],
    teacher_features: Float[Tensor, "e_t f"] | None = None,
    student_features: Float[Tensor, "e_s f"] | None = None,
) -> Matching:
    """Experts of a MoE layer, whatever the order of the neurons inside them.

    An expert is described by its router row (its address in the residual stream; the mean row, to which softmax is
    blind, is taken off) and, if given, by features that no permutation of its neurons changes
    (``expert_probe_features``), in equal parts.

    Raises:
        ValueError: as ``match_rows``, or features of one side only.
    """
    if (teacher_features is None) != (student_features is None):
        raise ValueError("features are needed of both sides or of neither")
    teacher, student = [_centred(teacher_router)], [_centred(student_router)]
    if teacher_features is not None and student_features is not None:
        teacher.append(teacher_features)
        student.append(student_features)
    return match_similarity(cosine_similarity(teacher, student))


def expert_probe_features(
    gate: Float[Tensor, "e i h"], up: Float[Tensor, "e i h"], down: Float[Tensor, "e h i"], probes: Float[Tensor, "h k"]
) -> Float[Tensor, "e h_k"]:
    """What each expert writes for fixed probe vectors ``x``: ``down ((gate x) * (up x))``, flattened to (e, h * k).

    The sum over neurons makes it blind to their order. The activation is left out: the features stay polynomial.
    """
    return torch.cat(
        [
            (D.float() @ ((G.float() @ probes) * (U.float() @ probes))).reshape(1, -1)
            for G, U, D in zip(gate, up, down, strict=True)
        ]
    )


def match_attention_heads(
    teacher: tuple[Tensor, Tensor, Tensor, Tensor],
    student: tuple[Tensor, Tensor, Tensor, Tensor],
    head_dim: int,
) -> HeadMatching:
    """Heads of grouped-query attention: key/value heads first, then the query heads within each matched group.

    Args:
        teacher: q (heads * head_dim, hidden), k and v (kv * head_dim, hidden), o (hidden, heads * head_dim).
        student: the same; it may have fewer heads, and fewer query heads per group, but the same hidden size, head_dim.
        head_dim: rows of one head. Their order within a head is fixed by the rotary embedding and is not touched.

    A key/value head is described by its k and v rows, which no order of its query heads changes; a query head by its q
    rows and o columns.

    Raises:
        ValueError: sizes that are no multiples of each other, or as ``match_rows``.
    """
    q_t, k_t, v_t, o_t = (tensor.float() for tensor in teacher)
    q_s, k_s, v_s, o_s = (tensor.float() for tensor in student)
    group_t, group_s = _group_size(q_t, k_t, head_dim), _group_size(q_s, k_s, head_dim)
    if group_s > group_t:
        raise ValueError(f"student groups of {group_s} query heads do not fit into teacher groups of {group_t}")
    teacher_kv = [_heads(k_t, head_dim), _heads(v_t, head_dim)]
    kv = match_similarity(cosine_similarity(teacher_kv, [_heads(k_s, head_dim), _heads(v_s, head_dim)]))
    teacher_query = [_heads(q_t, head_dim), _heads(o_t.mT, head_dim)]
    similarity = cosine_similarity(teacher_query, [_heads(q_s, head_dim), _heads(o_s.mT, head_dim)])
    index, similarities, margins = [], [], []
    for group, kv_head in enumerate(kv.teacher_index.tolist()):
        first = kv_head * group_t
        block = similarity[group * group_s : (group + 1) * group_s, first : first + group_t]
        within = match_similarity(block)
        index.append(within.teacher_index + first)
        similarities.append(within.similarity)
        margins.append(within.margin)
    count = len(index)
    return HeadMatching(kv.teacher_index, torch.cat(index), kv, sum(similarities) / count, sum(margins) / count)


def cosine_similarity(
    teacher: Sequence[Float[Tensor, "m _"]], student: Sequence[Float[Tensor, "p _"]]
) -> Float[Tensor, "p m"]:
    """Cosine similarity of rows made of several parts, each part scaled to a root mean square row norm of one."""
    inner: Tensor | float = 0.0
    square_t: Tensor | float = 0.0
    square_s: Tensor | float = 0.0
    for part_t, part_s in zip(teacher, student, strict=True):
        T, S = part_t.float(), part_s.float()
        norms_t, norms_s = torch.linalg.vector_norm(T, dim=1), torch.linalg.vector_norm(S, dim=1)
        scale_t, scale_s = _unit_mean(norms_t), _unit_mean(norms_s)
        inner = inner + (S @ T.mT) * (scale_t * scale_s)
        square_t = square_t + (norms_t * scale_t).square()
        square_s = square_s + (norms_s * scale_s).square()
    tiny = torch.finfo(torch.float32).tiny
    lengths_t = torch.as_tensor(square_t).clamp_min(tiny).sqrt()
    lengths_s = torch.as_tensor(square_s).clamp_min(tiny).sqrt()
    return torch.as_tensor(inner) / lengths_t / lengths_s[:, None]


def match_similarity(similarity: Float[Tensor, "p m"]) -> Matching:
    """The one-to-one matching of largest total similarity, each student row with one teacher column.

    Raises:
        ValueError: more rows than columns, or an entry that is not finite.
    """
    p, m = similarity.shape
    if p > m:
        raise ValueError(f"{p} student items cannot be matched one to one with {m} teacher items")
    if not bool(torch.isfinite(similarity).all()):
        raise ValueError("similarities are not finite")
    best = similarity.argmax(1)
    if len(set(best.tolist())) == p:
        index = best  # the row maxima bound every matching, so this one is the best
    else:
        from scipy.optimize import linear_sum_assignment  # half a second that most processes need not pay

        chosen = linear_sum_assignment(similarity.double().cpu().numpy(), maximize=True)[1]
        index = torch.from_numpy(chosen).to(similarity.device)
    matched = similarity.gather(1, index[:, None]).squeeze(1)
    if m == 1:
        return Matching(index, float(matched.mean()), 0.0, 0.0, 0.0)
    others = similarity.scatter(1, index[:, None], -math.inf)
    rest = (p * m) - p
    sum_rest = float(similarity.sum(dtype=torch.float64) - matched.sum(dtype=torch.float64))
    square_rest = float(similarity.square().sum(dtype=torch.float64) - matched.square().sum(dtype=torch.float64))
    mean = sum_rest / rest
    spread = math.sqrt(max(0.0, square_rest / rest - mean**2))
    return Matching(
        teacher_index=index,
        similarity=float(matched.mean()),
        margin=float((matched - others.amax(1)).mean()),
        chance=mean + spread * _expected_maximum(m),
        spread=spread,
    )


def _expected_maximum(count: int) -> float:
    """Expected largest of ``count`` standard normal numbers, to about one per cent (Blom 1958)."""
    probability = (count - 0.375) / (count + 0.25)
    return math.sqrt(2.0) * float(torch.erfinv(torch.tensor(2.0 * probability - 1.0, dtype=torch.float64)))


def _unit_mean(norms: Tensor) -> Tensor:
    """Factor that brings the root mean square of the row norms to one."""
    return norms.square().mean().clamp_min(torch.finfo(norms.dtype).tiny).rsqrt()


def _centred(rows: Tensor) -> Tensor:
    wide = rows.float()
    return wide - wide.mean(0)


def _heads(rows: Tensor, head_dim: int) -> Tensor:
    return rows.reshape(rows.shape[0] // head_dim, -1)


def _group_size(q: Tensor, k: Tensor, head_dim: int) -> int:
    if q.shape[0] % head_dim or k.shape[0] % head_dim or q.shape[0] % k.shape[0]:
        raise ValueError(f"q of {q.shape[0]} and k of {k.shape[0]} rows are not groups of heads of {head_dim}")
    return q.shape[0] // k.shape[0]
