"""Grouping a teacher layer's experts by k-means, from their Gram matrix alone.

Every distance between fingerprints (an expert's weights, concatenated) is a function of their inner products, so
k-means on an isometric embedding of the experts x experts Gram matrix gives the labels it gives on the fingerprints.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from moe_svd_distill.algebra.interpolation import check_weight, spherical_coefficients
from moe_svd_distill.algebra.matching import best_assignment

GRAM_COLUMNS = 1 << 15  # columns multiplied in float32 before they are added up in float64


@dataclass(frozen=True)
class Clustering:
    """Which cluster every expert belongs to."""

    labels: Int[Tensor, "experts"]  # cluster of each expert, 0 .. clusters - 1; no cluster is empty
    weights: Float[Tensor, "clusters experts"]  # centres = weights @ fingerprints
    inertia: float  # sum of squared distances of the experts to their centres


def gram_of_rows(
    chunks: Iterable[Float[Tensor, "experts _"]], *, centred: bool = False
) -> Float[Tensor, "experts experts"]:
    """float64 Gram matrix of fingerprints that arrive in pieces, (experts, columns) each.

    float32 products over at most ``GRAM_COLUMNS`` columns, added up in float64: about 1e-7 of the diagonal.
    ``centred`` subtracts the mean expert first, which leaves distances alone and keeps digits when experts are alike.

    Raises:
        ValueError: no pieces, or pieces that disagree about the number of experts.
    """
    total: Tensor | None = None
    for chunk in chunks:
        total = _zeros(chunk) if total is None else total
        if chunk.shape[0] != total.shape[0]:
            raise ValueError(f"a piece of {chunk.shape[0]} experts does not fit to one of {total.shape[0]}")
        for start in range(0, chunk.shape[1], GRAM_COLUMNS):
            piece = _piece(chunk, start, centred)
            total += piece @ piece.mT
    if total is None:
        raise ValueError("no pieces of fingerprints were given")
    return total


def gram_blocks(
    chunk_pairs: Iterable[tuple[Float[Tensor, "experts _"], Float[Tensor, "experts _"]]],
) -> tuple[Float[Tensor, "experts experts"], Float[Tensor, "experts experts"], Float[Tensor, "experts experts"]]:
    """``G_ff, G_fc, G_cc`` of the fingerprints of two adjacent layers (floor, ceil) in one pass over their pieces.

    Raises:
        ValueError: as ``gram_of_rows``, or a pair of pieces of different shapes.
    """
    totals: tuple[Tensor, Tensor, Tensor] | None = None
    for floor, ceil in chunk_pairs:
        totals = (_zeros(floor), _zeros(floor), _zeros(floor)) if totals is None else totals
        if floor.shape != ceil.shape or floor.shape[0] != totals[0].shape[0]:
            raise ValueError(f"pieces of shapes {tuple(floor.shape)} and {tuple(ceil.shape)} do not fit together")
        for start in range(0, floor.shape[1], GRAM_COLUMNS):
            first, second = _piece(floor, start, False), _piece(ceil, start, False)
            for total, left, right in zip(totals, (first, first, second), (first, second, second), strict=True):
                total += left @ right.mT
    if totals is None:
        raise ValueError("no pieces of fingerprints were given")
    return totals


def interpolated_gram(
    G_ff: Float[Tensor, "experts experts"],
    G_fc: Float[Tensor, "experts experts"],
    G_cc: Float[Tensor, "experts experts"],
    weight: float,
    spherical: bool,
) -> Float[Tensor, "experts experts"]:
    """Gram matrix of ``interpolate(floor_i, ceil_i, weight)``, expert by expert, without the fingerprints.

    ``G_fc[i, j] = <floor_i, ceil_j>``. Spherical interpolation turns each expert's whole vector; for one that is done
    tensor by tensor, call this with each tensor's Gram matrices and add the results.
    """
    check_weight(weight)
    diagonal_f, diagonal_c = G_ff.diagonal(), G_cc.diagonal()
    if spherical:
        left, right = spherical_coefficients(diagonal_f.sqrt(), diagonal_c.sqrt(), G_fc.diagonal(), weight)
    else:
        left, right = torch.full_like(diagonal_f, 1.0 - weight), torch.full_like(diagonal_c, weight)
    cross = left[:, None] * G_fc * right
    return left[:, None] * G_ff * left + cross + cross.mT + right[:, None] * G_cc * right


def gram_embedding(gram: Float[Tensor, "experts experts"]) -> Float[Tensor, "experts experts"]:
    """Points (one per row, float64) with the given inner products: ``V sqrt(eigenvalues)``, negative ones as zero."""
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp_min(0.0).sqrt()


def kmeans_from_gram(
    gram: Float[Tensor, "experts experts"], clusters: int, seed: int, restarts: int = 10
) -> Clustering:
    """scikit-learn's k-means (k-means++ starts, ``restarts`` of them) on the embedding of ``gram``.

    The labels are those scikit-learn finds on the fingerprints with the same seed and restarts. A cluster that is left
    empty (experts that equal each other) takes the expert farthest from its centre, so that every cluster has a member.

    Raises:
        ValueError: fewer than one cluster, more clusters than experts, or a Gram matrix that is not finite.
    """
    experts = gram.shape[0]
    if not 1 <= clusters <= experts:
        raise ValueError(f"{experts} experts cannot form {clusters} clusters")
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the Gram matrix has an entry that is not finite")
    if clusters == experts:
        labels = np.arange(experts)
    else:
        from sklearn.cluster import KMeans  # more than a second that most processes need not pay
        from sklearn.exceptions import ConvergenceWarning

        points = gram_embedding(gram).cpu().numpy()
        with warnings.catch_warnings(), threadpool_limits(1):  # so few points: threads would only wait for each other
            warnings.simplefilter("ignore", ConvergenceWarning)
            labels = KMeans(clusters, n_init=restarts, random_state=seed).fit(points).labels_.astype(np.int64)
        labels = _fill_empty(points, labels, clusters)
    return clustering_of(gram, torch.from_numpy(labels).to(gram.device), clusters)


def clustering_of(gram: Float[Tensor, "experts experts"], labels: Int[Tensor, "experts"], clusters: int) -> Clustering:
    """Centre weights and inertia of given labels.

    Raises:
        ValueError: a cluster without a member.
    """
    if labels.unique(sorted=True).shape[0] != clusters:  # type: ignore[no-untyped-call]
        raise ValueError(f"not every one of {clusters} clusters has a member")
    membership = torch.nn.functional.one_hot(labels.long(), clusters).mT.to(torch.float64)
    weights = membership / membership.sum(1, keepdim=True)
    full = gram.double()
    inertia = full.diagonal().sum() - ((weights @ full) * membership).sum()
    return Clustering(labels.long(), weights.float(), max(0.0, float(inertia)))


def assign_clusters(similarity: Float[Tensor, "clusters student_experts"]) -> Int[Tensor, "clusters"]:
    """Student expert of every cluster, one to one, at the largest total similarity (Hungarian method).

    Raises:
        ValueError: not square, or not finite.
    """
    clusters, experts = similarity.shape
    if clusters != experts:
        raise ValueError(f"{clusters} clusters cannot be assigned one to one to {experts} student experts")
    return best_assignment(similarity)


def _zeros(chunk: Float[Tensor, "experts _"]) -> Float[Tensor, "experts experts"]:
    return torch.zeros(chunk.shape[0], chunk.shape[0], dtype=torch.float64, device=chunk.device)


def _piece(chunk: Float[Tensor, "experts _"], start: int, centred: bool) -> Tensor:
    piece = chunk[:, start : start + GRAM_COLUMNS].float()
    return piece - piece.mean(0, keepdim=True) if centred else piece


def _fill_empty(points: np.ndarray, labels: np.ndarray, clusters: int) -> np.ndarray:
    filled = labels.copy()
    for empty in sorted(set(range(clusters)) - set(labels.tolist())):
        sizes = np.bincount(filled, minlength=clusters)
        centres = np.stack([points[filled == c].mean(0) if sizes[c] else points[0] for c in range(clusters)])
        distance = np.square(points - centres[filled]).sum(1)
        distance[sizes[filled] < 2] = -1.0
        filled[int(distance.argmax())] = empty
    return filled
