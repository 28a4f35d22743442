"""``gsto_ops::gated_pyramid_pool``: K gates and K pooled maps from one read of a feature (Section 3.3, Fig. 4)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .autograd import differentiable_backward
from .library import empty_like_layout, layout_of, register

SCHEMA = "(Tensor input, Tensor gate_weight, Tensor? gate_bias, int[] bins) -> (Tensor pooled, Tensor gate)"
BACKWARD_SCHEMA = (
    "(Tensor grad_pooled, Tensor? grad_gate, Tensor input, Tensor gate, Tensor gate_weight, int[] bins) -> "
    "(Tensor grad_input, Tensor grad_gate_weight, Tensor grad_gate_bias)"
)


def _kernel(input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, bins: list[int]) -> tuple[Tensor, Tensor]:
    pooled, gate = reference.gated_pyramid_pool(input, gate_weight, gate_bias, bins)
    return pooled.contiguous(), gate.contiguous()


def _backward_kernel(
    grad_pooled: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    bins: list[int],
) -> tuple[Tensor, ...]:
    grad_input, *grads = reference.gated_pyramid_pool_backward(grad_pooled, grad_gate, input, gate, gate_weight, bins)
    return grad_input.contiguous(memory_format=layout_of(input)), *(grad.contiguous() for grad in grads)


def _fake(input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, bins: list[int]) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = input.shape
    pooled = input.new_empty((batch, channels, sum(b * b for b in bins)))
    return pooled, input.new_empty((batch, len(bins), height, width))


def _backward_fake(
    grad_pooled: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    bins: list[int],
) -> tuple[Tensor, ...]:
    return (
        empty_like_layout(input, input.shape),
        input.new_empty(gate_weight.shape),
        input.new_empty(gate_weight.shape[0]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, gate_weight, gate_bias, ctx.bins = inputs
    ctx.save_for_backward(input, output[1], gate_weight, gate_bias)
    ctx.set_materialize_grads(False)


def _backward(
    operator: Callable, ctx: Any, grad_pooled: Tensor | None, grad_gate: Tensor | None
) -> tuple[Tensor | None, ...]:
    input, gate, gate_weight, gate_bias = ctx.saved_tensors
    if grad_pooled is None and grad_gate is None:
        return (None,) * 3
    if torch.is_grad_enabled():
        function = partial(reference.gated_pyramid_pool, bins=ctx.bins)
        operands = (input, gate_weight, gate_bias)
        return tuple(differentiable_backward(function, operands, ctx.needs_input_grad, (grad_pooled, grad_gate)))
    if grad_pooled is None:
        cells = sum(b * b for b in ctx.bins)
        grad_pooled = input.new_zeros(()).expand(*input.shape[:2], cells)
    grad_input, grad_gate_weight, grad_gate_bias = operator(grad_pooled, grad_gate, input, gate, gate_weight, ctx.bins)
    return grad_input, grad_gate_weight, None if gate_bias is None else grad_gate_bias


register(
    "gated_pyramid_pool",
    SCHEMA,
    _kernel,
    _fake,
    BACKWARD_SCHEMA,
    _backward_kernel,
    _backward_fake,
    _setup_context,
    _backward,
    maps=("input",),
)
