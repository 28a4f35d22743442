"""``gsto_ops::gated_scale_transfer``: gate, multiply, project, activation, resample (Eq. 1-3)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .autograd import differentiable_backward
from .library import RESAMPLING, empty_like_layout, layout_of, register, scale_of

SCHEMA = (
    "(Tensor input, Tensor gate_weight, Tensor? gate_bias, Tensor? weight, Tensor? bias, str activation, SymInt[2] size, "
    f"{RESAMPLING}) -> (Tensor output, Tensor gate)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor? grad_gate, Tensor input, Tensor gate, Tensor gate_weight, Tensor? weight, Tensor? bias, "
    f"str activation, {RESAMPLING}) -> (Tensor grad_input, Tensor grad_gate_weight, Tensor grad_gate_bias, "
    "Tensor grad_weight, Tensor grad_bias)"
)


def _kernel(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    size: tuple[int, int],
    mode: str,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> tuple[Tensor, Tensor]:
    operands = (input, gate_weight, gate_bias, weight, bias)
    output, gate = reference.gated_scale_transfer(
        *operands, activation, (size[0], size[1]), mode, align_corners, scale_of(scale_h, scale_w)
    )
    return output.contiguous(memory_format=layout_of(input)), gate.contiguous()


def _backward_kernel(
    grad_output: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    mode: str,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> tuple[Tensor, ...]:
    operands = (grad_output, grad_gate, input, gate, gate_weight, weight, bias)
    grad_input, *grads = reference.gated_scale_transfer_backward(
        *operands, activation, mode, align_corners, scale_of(scale_h, scale_w)
    )
    return grad_input.contiguous(memory_format=layout_of(input)), *(grad.contiguous() for grad in grads)


def _fake(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    size: tuple[int, int],
    *resampling: Any,
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = input.shape
    channels = channels if weight is None else weight.shape[0]
    return empty_like_layout(input, (batch, channels, *size)), input.new_empty((batch, 1, height, width))


def _backward_fake(
    grad_output: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    return (
        empty_like_layout(input, input.shape),
        input.new_empty(gate_weight.shape),
        input.new_empty(1),
        input.new_empty(0 if weight is None else weight.shape),
        input.new_empty(0 if weight is None else weight.shape[0]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # The input and the gate are all that the backward pass keeps; the parameters are alive anyway.
    ctx.save_for_backward(output[1], *inputs[:5])
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(
    operator: Callable, ctx: Any, grad_output: Tensor | None, grad_gate: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_output is None and grad_gate is None:
        return (None,) * 5
    gate, input, gate_weight, gate_bias, weight, bias = ctx.saved_tensors
    activation, size, mode, align_corners, scale_h, scale_w = ctx.options
    if grad_output is None:
        channels = input.shape[1] if weight is None else weight.shape[0]
        grad_output = input.new_zeros(()).expand(input.shape[0], channels, *size)
    if torch.is_grad_enabled():
        function = partial(
            reference.gated_scale_transfer,
            activation=activation,
            size=size,
            mode=mode,
            align_corners=align_corners,
            scale_factors=scale_of(scale_h, scale_w),
        )
        operands = (input, gate_weight, gate_bias, weight, bias)
        return tuple(differentiable_backward(function, operands, ctx.needs_input_grad, (grad_output, grad_gate)))
    given = (grad_output, grad_gate, input, gate, gate_weight, weight, bias)
    found = operator(*given, activation, mode, align_corners, scale_h, scale_w)
    grad_input, grad_gate_weight, grad_gate_bias, grad_weight, grad_bias = found
    return (
        grad_input,
        grad_gate_weight,
        None if gate_bias is None else grad_gate_bias,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
    )


register(
    "gated_scale_transfer",
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
