"""Finding which neuron, expert or attention head of the teacher is which one of the student.

Every matching is one to one, at the largest total cosine similarity (Hungarian method). What it found may be chance:
models trained independently match at 0.18-0.22, a planted permutation at nearly 1.
"""

from __future__ import annotations

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

    @property
    def is_identity(self) -> bool:
        """Whether every student item is matched with the teacher item of its own number."""
        index = self.teacher_index
        return bool((index == torch.arange(index.shape[0], device=index.device)).all())


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
        ValueError: as ``match_similarity``.
    """
    teacher = [teacher_gate, teacher_up, teacher_down.mT]
    student = [student_gate, student_up, student_down.mT]
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
) -> tuple[Matching, Matching]:
    """Heads of grouped-query attention: key/value heads first, then the query heads within each matched group.

    Args:
        teacher: q (heads * head_dim, hidden), k and v (kv * head_dim, hidden), o (hidden, heads * head_dim).
        student: the same; it may have fewer heads, and fewer query heads per group, but the same hidden size, head_dim.
        head_dim: rows of one head. Their order within a head is fixed by the rotary embedding and is not touched.

    A key/value head is described by its k and v rows, which no order of its query heads changes; a query head by its q
    rows and o columns.

    Returns:
        Key/value heads, and query heads over the whole layer.

    Raises:
        ValueError: sizes that are no multiples of each other, or as ``match_similarity``.
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
    index, similarities = [], []
    for group, kv_head in enumerate(kv.teacher_index.tolist()):
        first = kv_head * group_t
        block = similarity[group * group_s : (group + 1) * group_s, first : first + group_t]
        within = match_similarity(block)
        index.append(within.teacher_index + first)
        similarities.append(within.similarity)
    return kv, Matching(torch.cat(index), sum(similarities) / len(index))


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
    # Row maxima bound every matching, so where they are all different they are the best.
    index = best if len(set(best.tolist())) == p else best_assignment(similarity)
    return Matching(index, float(similarity.gather(1, index[:, None]).mean()))


def best_assignment(similarity: Float[Tensor, "p m"]) -> Int[Tensor, "p"]:
    """The column of every row, one to one, at the largest total (Hungarian method); p <= m.

    Raises:
        ValueError: an entry that is not finite.
    """
    from scipy.optimize import linear_sum_assignment  # half a second that most processes need not pay

    chosen = linear_sum_assignment(similarity.double().cpu().numpy(), maximize=True)[1]
    return torch.from_numpy(chosen).to(similarity.device)


def _unit_mean(norms: Tensor) -> Tensor:
    """Factor that brings the root mean square of the row norms to one."""
    return norms.square().mean().clamp_min(torch.finfo(norms.dtype).tiny).rsqrt()


def _heads(rows: Tensor, head_dim: int) -> Tensor:
    return rows.reshape(rows.shape[0] // head_dim, -1)


def _group_size(q: Tensor, k: Tensor, head_dim: int) -> int:
    if q.shape[0] % head_dim or k.shape[0] % head_dim or q.shape[0] % k.shape[0]:
        raise ValueError(f"q of {q.shape[0]} and k of {k.shape[0]} rows are not groups of heads of {head_dim}")
    return q.shape[0] // k.shape[0]


def permute_neurons(
    gate: Float[Tensor, "i h"], up: Float[Tensor, "i h"], down: Float[Tensor, "h i"], index: Int[Tensor, "p"]
) -> tuple[Float[Tensor, "p h"], Float[Tensor, "p h"], Float[Tensor, "h p"]]:
    """The neurons ``index`` of a gated MLP, in that order."""
    return gate[index], up[index], down[:, index]


def permute_heads(
    heads: tuple[Tensor, Tensor, Tensor, Tensor],
    kv_index: Int[Tensor, "kv"],
    query_index: Int[Tensor, "heads"],
    head_dim: int,
) -> tuple[
    Float[Tensor, "q_rows_p h"], Float[Tensor, "kv_rows_p h"], Float[Tensor, "kv_rows_p h"], Float[Tensor, "h q_rows_p"]
]:
    """The heads chosen by ``match_attention_heads``, in that order; the rows within each head stay as they are.

    Args:
        heads: q (heads * head_dim, hidden), k and v (kv * head_dim, hidden), o (hidden, heads * head_dim).
        kv_index: Of the key/value heads.
        query_index: Of the query heads.
        head_dim: Rows of one head.
    """
    q, k, v, o = heads
    query, kv = block_index(query_index, head_dim), block_index(kv_index, head_dim)
    return q[query], k[kv], v[kv], o[:, query]


def block_index(index: Int[Tensor, "b"], size: int) -> Int[Tensor, "b_size"]:
    """Row numbers of the blocks ``index``, each of ``size`` rows (use it for biases of heads as well)."""
    return (index[:, None] * size + torch.arange(size, device=index.device)).flatten()
