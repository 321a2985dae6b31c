"""One synthetic expert from the experts of a cluster."""

import torch
from jaxtyping import Float
from torch import Tensor


def blend(matrices: Float[Tensor, "c m n"], weights: Float[Tensor, "c"]) -> Float[Tensor, "m n"]:
    """``sum_i weights_i matrices_i`` in float32. Weights are taken as given; those of this module sum to one."""
    return torch.tensordot(weights.float().to(matrices.device), matrices.float(), dims=1)


def frobenius_weights(matrices: Float[Tensor, "c m n"]) -> Float[Tensor, "c"]:
    """Each matrix by its Frobenius norm, summing to one; uniform where all are zero."""
    norms = torch.linalg.vector_norm(matrices.flatten(1), dim=1, dtype=torch.float32)
    total = norms.sum()
    return norms / total if float(total) > 0.0 else uniform_weights(matrices)


def uniform_weights(matrices: Float[Tensor, "c m n"]) -> Float[Tensor, "c"]:
    """``1 / c`` for each of the ``c`` matrices."""
    count = matrices.shape[0]
    return torch.full((count,), 1.0 / count, device=matrices.device)
