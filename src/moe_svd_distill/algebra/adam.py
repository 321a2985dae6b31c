"""Adam's step (Kingma and Ba, arXiv 1412.6980) without weight decay, on moments the caller keeps."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

FIRST_MOMENT, SECOND_MOMENT, TINY = 0.9, 0.98, 1e-10


def adam_step(
    values: Float[Tensor, "m n"],
    gradient: Float[Tensor, "m n"],
    mean: Float[Tensor, "m n"],
    square: Float[Tensor, "m n"],
    rate: float,
    step: int,
) -> None:
    """Move values and moments in place.

    Args:
        values: What is moved.
        gradient: Of what falls, by the values.
        mean: Running mean of gradients.
        square: Running mean of their squares.
        rate: Largest step of an entry.
        step: Number of the step, from 1, for the correction of the moments' start at zero.
    """
    mean.mul_(FIRST_MOMENT).add_(gradient, alpha=1 - FIRST_MOMENT)
    square.mul_(SECOND_MOMENT).addcmul_(gradient, gradient, value=1 - SECOND_MOMENT)
    scale = (square / (1 - SECOND_MOMENT**step)).sqrt_().add_(TINY)
    values.addcdiv_(mean, scale, value=-rate / (1 - FIRST_MOMENT**step))
