"""A low-rank product beside a linear module: what is added to its output, and where the gradients of its factors go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def add_product(module: nn.Module, a: Tensor, b: Tensor, slope_a: Tensor, slope_b: Tensor) -> None:
    """Let a module give ``W x + B A x``, and backward passes add to the gradients of A and B.

    Copies of the module that are made afterwards do so, too.

    Args:
        module: A linear module.
        a: Float32, (rank, columns); read anew at each call.
        b: Float32, (rows, rank).
        slope_a: Where the gradient of A is added up, (rank, columns).
        slope_b: The same of B, (rows, rank).
    """
    anchor = torch.zeros((), device=a.device, requires_grad=True)  # inputs of the first layer need no gradient

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        product: Tensor = _Product.apply(inputs[0], a, b, slope_a, slope_b, anchor)  # type: ignore[no-untyped-call]
        return output + product

    module.register_forward_hook(hook)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, states: Tensor, a: Tensor, b: Tensor, slope_a: Tensor, slope_b: Tensor, anchor: Tensor
    ) -> Tensor:
        down, up = a.to(states.dtype), b.to(states.dtype)
        inner = states @ down.T
        context.save_for_backward(states, inner)
        context.factors = down, up, slope_a, slope_b
        return inner @ up.T

    @staticmethod
    def backward(context: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        states, inner = context.saved_tensors
        down, up, slope_a, slope_b = context.factors
        slope = slopes[0]
        slope_b.add_(slope.flatten(0, -2).T @ inner.flatten(0, -2))
        of_inner = slope @ up
        slope_a.add_(of_inner.flatten(0, -2).T @ states.flatten(0, -2))
        return of_inner @ down if context.needs_input_grad[0] else None, None, None, None, None, None
