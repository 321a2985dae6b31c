"""Applying a matching: pure index functions."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def permute_neurons(
    gate: Float[Tensor, "i h"], up: Float[Tensor, "i h"], down: Float[Tensor, "h i"], index: Int[Tensor, "p"]
) -> tuple[Float[Tensor, "p h"], Float[Tensor, "p h"], Float[Tensor, "h p"]]:
    """The neurons ``index`` of a gated MLP, in that order."""
    return gate[index], up[index], down[:, index]


def permute_heads(
    q: Float[Tensor, "q_rows h"],
    k: Float[Tensor, "kv_rows h"],
    v: Float[Tensor, "kv_rows h"],
    o: Float[Tensor, "h q_rows"],
    kv_index: Int[Tensor, "kv"],
    query_index: Int[Tensor, "heads"],
    head_dim: int,
) -> tuple[
    Float[Tensor, "q_rows_p h"], Float[Tensor, "kv_rows_p h"], Float[Tensor, "kv_rows_p h"], Float[Tensor, "h q_rows_p"]
]:
    """The heads chosen by a ``HeadMatching``, in that order; the rows within each head stay as they are."""
    query, kv = block_index(query_index, head_dim), block_index(kv_index, head_dim)
    return q[query], k[kv], v[kv], o[:, query]


def block_index(index: Int[Tensor, "b"], size: int) -> Int[Tensor, "b_size"]:
    """Row numbers of the blocks ``index``, each of ``size`` rows (use it for biases of heads as well)."""
    return (index[:, None] * size + torch.arange(size, device=index.device)).flatten()
