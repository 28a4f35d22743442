"""``gsto_ops::gated_projection``: gate, multiply, project, with the batch statistics of the result (Eq. 1, 2).

The training form of a projection that batch norm follows: the mean and variance come from the projection's epilogue, and
:mod:`.affine_scale_transfer` applies the norm, so that no normalised map is written.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .autograd import differentiable_backward
from .library import empty_like_layout, layout_of, register

SCHEMA = (
    "(Tensor input, Tensor gate_weight, Tensor? gate_bias, Tensor weight) -> "
    "(Tensor output, Tensor gate, Tensor mean, Tensor var)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor? grad_gate, Tensor? grad_mean, Tensor? grad_var, Tensor input, Tensor gate, "
    "Tensor gate_weight, Tensor weight, Tensor output, Tensor mean) -> "
    "(Tensor grad_input, Tensor grad_gate_weight, Tensor grad_gate_bias, Tensor grad_weight)"
)


def _kernel(input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, weight: Tensor) -> tuple[Tensor, ...]:
    output, gate, mean, var = reference.gated_projection(input, gate_weight, gate_bias, weight)
    return output.contiguous(memory_format=layout_of(input)), gate.contiguous(), mean, var


def _backward_kernel(*operands: Any) -> tuple[Tensor, ...]:
    grad_input, *grads = reference.gated_projection_backward(*operands)
    return grad_input.contiguous(memory_format=layout_of(operands[4])), *(grad.contiguous() for grad in grads)


def _fake(input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, weight: Tensor) -> tuple[Tensor, ...]:
    batch, _, height, width = input.shape
    statistics = [input.new_empty(weight.shape[0], dtype=reference.statistics_dtype(input)) for _ in range(2)]
    output = empty_like_layout(input, (batch, weight.shape[0], height, width))
    return output, input.new_empty((batch, 1, height, width)), *statistics


def _backward_fake(
    grad_output: Tensor,
    grad_gate: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor,
    output: Tensor,
    mean: Tensor,
) -> tuple[Tensor, ...]:
    return (
        empty_like_layout(input, input.shape),
        input.new_empty(gate_weight.shape),
        input.new_empty(1),
        input.new_empty(weight.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, gate_weight, gate_bias, weight = inputs
    projected, gate, mean, _ = output
    # The projected map is the next operator's input, so keeping it costs nothing.
    ctx.save_for_backward(input, gate, gate_weight, gate_bias, weight, projected, mean)
    ctx.set_materialize_grads(False)


def _backward(
    operator: Callable,
    ctx: Any,
    grad_output: Tensor | None,
    grad_gate: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
) -> tuple[Tensor | None, ...]:
    input, gate, gate_weight, gate_bias, weight, output, mean = ctx.saved_tensors
    grads = (grad_output, grad_gate, grad_mean, grad_var)
    if all(grad is None for grad in grads):
        return (None,) * 4
    if torch.is_grad_enabled():
        operands = (input, gate_weight, gate_bias, weight)
        return tuple(differentiable_backward(reference.gated_projection, operands, ctx.needs_input_grad, grads))
    if grad_output is None:
        grad_output = output.new_zeros(()).expand_as(output)
    grad_input, grad_gate_weight, grad_gate_bias, grad_weight = operator(
        grad_output, grad_gate, grad_mean, grad_var, input, gate, gate_weight, weight, output, mean
    )
    return grad_input, grad_gate_weight, None if gate_bias is None else grad_gate_bias, grad_weight


register(
    "gated_projection",
    SCHEMA,
    _kernel,
    _fake,
    BACKWARD_SCHEMA,
    _backward_kernel,
    _backward_fake,
    _setup_context,
    _backward,
)
