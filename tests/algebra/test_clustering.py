"""k-means from Gram matrices, against scikit-learn on the fingerprints."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import Tensor

from moe_svd_distill.algebra.clustering import (
    assign_clusters,
    clustering_of,
    gram_blocks,
    gram_embedding,
    gram_of_rows,
    interpolated_gram,
    kmeans_from_gram,
)
from moe_svd_distill.algebra.interpolation import linear, spherical


def fingerprints(experts: int, length: int, groups: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, length, generator=generator)
    chosen = torch.arange(experts) % groups
    return centres[chosen] + 0.8 * torch.randn(experts, length, generator=generator)


def test_gram_from_pieces_is_the_float64_product() -> None:
    rows = fingerprints(12, 70_000, 4)
    pieces = [rows[:, :100], rows[:, 100:40_000], rows[:, 40_000:]]
    exact = rows.double() @ rows.double().T
    torch.testing.assert_close(gram_of_rows(pieces), exact, rtol=0, atol=2e-6 * float(exact.max()))
    centred = rows.double() - rows.double().mean(0)
    torch.testing.assert_close(gram_of_rows(pieces, centred=True), centred @ centred.T, rtol=0, atol=0.2)


def test_centring_keeps_the_digits_of_nearly_equal_experts() -> None:
    rows = 100.0 + 1e-3 * fingerprints(6, 5000, 2)
    exact = rows.double() - rows.double().mean(0)
    exact = exact @ exact.T
    torch.testing.assert_close(gram_of_rows([rows], centred=True), exact, rtol=0, atol=1e-2 * float(exact.max()))


def test_pieces_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no pieces"):
        gram_of_rows([])
    with pytest.raises(ValueError, match="no pieces"):
        gram_blocks([])
    with pytest.raises(ValueError, match="fit"):
        gram_of_rows([torch.ones(3, 2), torch.ones(4, 2)])
    with pytest.raises(ValueError, match="fit"):
        gram_blocks([(torch.ones(3, 2), torch.ones(3, 2)), (torch.ones(3, 2), torch.ones(3, 4))])


@pytest.mark.parametrize("weight", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("on_the_sphere", [False, True])
def test_gram_of_interpolated_fingerprints(weight: float, on_the_sphere: bool) -> None:
    floor, ceil = fingerprints(7, 900, 3), fingerprints(7, 900, 3, seed=1)
    blocks = gram_blocks([(floor[:, :400], ceil[:, :400]), (floor[:, 400:], ceil[:, 400:])])
    interpolate = spherical if on_the_sphere else linear
    mixed = torch.stack([interpolate(f, c, weight) for f, c in zip(floor.double(), ceil.double(), strict=True)])
    found = interpolated_gram(*blocks, weight, on_the_sphere)
    torch.testing.assert_close(found, mixed @ mixed.T, rtol=1e-4, atol=1e-2)


def test_embedding_is_isometric() -> None:
    rows = fingerprints(15, 300, 4)
    points = gram_embedding(gram_of_rows([rows]))
    torch.testing.assert_close(
        torch.cdist(points, points), torch.cdist(rows.double(), rows.double()), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(("experts", "clusters", "groups"), [(24, 8, 8), (32, 12, 5), (40, 16, 40), (9, 1, 3)])
@pytest.mark.parametrize("seed", [0, 42])
def test_labels_are_those_of_scikit_learn_on_the_fingerprints(
    experts: int, clusters: int, groups: int, seed: int
) -> None:
    rows = fingerprints(experts, 4000, groups, seed)
    reference = KMeans(clusters, n_init=10, random_state=seed).fit(rows.numpy())
    found = kmeans_from_gram(gram_of_rows([rows]), clusters, seed)
    assert found.labels.tolist() == reference.labels_.tolist()
    assert found.inertia == pytest.approx(reference.inertia_, rel=1e-4)


def test_centre_weights_give_the_centres() -> None:
    rows = fingerprints(20, 500, 6)
    found = kmeans_from_gram(gram_of_rows([rows]), 6, 42)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(6))
    for cluster, centre in enumerate(found.weights @ rows):
        torch.testing.assert_close(centre, rows[found.labels == cluster].mean(0))


def test_as_many_clusters_as_experts_gives_each_its_own() -> None:
    found = kmeans_from_gram(gram_of_rows([fingerprints(5, 50, 5)]), 5, 42)
    assert found.labels.tolist() == [0, 1, 2, 3, 4]
    assert found.inertia == pytest.approx(0.0, abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(experts=st.integers(1, 12), distinct=st.integers(1, 4), clusters=st.integers(1, 12), seed=st.integers(0, 50))
def test_no_cluster_is_empty_even_among_equal_experts(experts: int, distinct: int, clusters: int, seed: int) -> None:
    clusters = min(clusters, experts)
    rows = fingerprints(distinct, 30, distinct, seed)[torch.arange(experts) % distinct]
    found = kmeans_from_gram(gram_of_rows([rows]), clusters, seed, restarts=2)
    assert sorted(set(found.labels.tolist())) == list(range(clusters))
    assert not found.weights.isnan().any()


def test_impossible_clusterings_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot form"):
        kmeans_from_gram(torch.eye(3), 4, 0)
    with pytest.raises(ValueError, match="cannot form"):
        kmeans_from_gram(torch.eye(3), 0, 0)
    with pytest.raises(ValueError, match="finite"):
        kmeans_from_gram(torch.full((3, 3), float("nan")), 2, 0)
    with pytest.raises(ValueError, match="member"):
        clustering_of(torch.eye(3), torch.tensor([0, 0, 2]), 3)


def test_clusters_are_assigned_at_the_largest_total_similarity() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.0], [0.8, 0.1, 0.0], [0.0, 0.2, 0.3]])
    assert assign_clusters(similarity).tolist() == [1, 0, 2]
    with pytest.raises(ValueError, match="one to one"):
        assign_clusters(torch.ones(2, 3))
