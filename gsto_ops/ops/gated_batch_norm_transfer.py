"""``gsto_ops::gated_batch_norm_transfer``: gate, multiply, project, batch norm in training mode, activation, resample (Fig. 2).

What :mod:`.gated_projection` and :mod:`.affine_scale_transfer` do, with the norm's scale and shift in between, as one operator:
the norm by itself is four small operators forward and twelve backward, which take longer to start than a small map takes to
compute. On the CPU it is one compiled kernel; elsewhere it is made of those two operators.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.gated_batch_norm_transfer import backward_steps, forward_steps
from .autograd import differentiable_backward
from .library import RESAMPLING, empty_like_layout, register, scale_of

OPERANDS = "Tensor weight, Tensor norm_weight, Tensor norm_bias"
SCHEMA = (
    f"(Tensor input, Tensor gate_weight, Tensor? gate_bias, {OPERANDS}, float eps, str activation, SymInt[2] size, "
    f"{RESAMPLING}) -> (Tensor output, Tensor projected, Tensor gate, Tensor mean, Tensor var)"
)
BACKWARD_SCHEMA = (
    f"(Tensor grad_output, Tensor input, Tensor gate_weight, {OPERANDS}, Tensor projected, Tensor gate, Tensor mean, Tensor var, "
    f"float eps, str activation, {RESAMPLING}) -> (Tensor grad_input, Tensor grad_gate_weight, Tensor grad_gate_bias, "
    "Tensor grad_weight, Tensor grad_norm_weight, Tensor grad_norm_bias)"
)


def _kernel(*operands: Any) -> tuple[Tensor, ...]:
    ops = torch.ops.gsto_ops
    return forward_steps(ops.gated_projection, ops.affine_scale_transfer, *operands)


def _backward_kernel(*operands: Any) -> tuple[Tensor, ...]:
    ops = torch.ops.gsto_ops
    return backward_steps(ops.gated_projection_backward, ops.affine_scale_transfer_backward, *operands)


def _fake(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str,
    size: tuple[int, int],
    *resampling: Any,
) -> tuple[Tensor, ...]:
    batch, _, height, width = input.shape
    channels = weight.shape[0]
    maps = [empty_like_layout(input, (batch, channels, *hw)) for hw in (size, (height, width))]
    statistics = [input.new_empty(channels, dtype=reference.statistics_dtype(input)) for _ in range(2)]
    return *maps, input.new_empty((batch, 1, height, width)), *statistics


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    gate_weight: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    parameters = [input.new_empty(shape) for shape in (gate_weight.shape, (1,), weight.shape)]
    norm = [vector.new_empty(vector.shape) for vector in (norm_weight, norm_bias)]
    return empty_like_layout(input, input.shape), *parameters, *norm


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        input,
        gate_weight,
        gate_bias,
        weight,
        norm_weight,
        norm_bias,
        ctx.eps,
        ctx.activation,
        ctx.size,
        *ctx.resampling,
    ) = inputs
    kept = output[1:]  # as in gated_projection
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, gate_weight, weight, norm_weight, norm_bias, *kept, gate_bias)


def _backward(operator: Callable, ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 6
    *saved, gate_bias = ctx.saved_tensors
    if torch.is_grad_enabled():
        mode, align_corners, *scale = ctx.resampling
        arguments = (ctx.eps, ctx.activation, ctx.size, mode, align_corners, scale_of(*scale))
        input, gate_weight, weight, norm_weight, norm_bias = saved[:5]
        operands = (input, gate_weight, gate_bias, weight, norm_weight, norm_bias)
        function = partial(_output, arguments)
        return tuple(differentiable_backward(function, operands, ctx.needs_input_grad, (grad_output,)))
    found = operator(grad_output, *saved, ctx.eps, ctx.activation, *ctx.resampling)
    if gate_bias is None:
        found = (*found[:2], None, *found[3:])
    return found


def _output(arguments: tuple[Any, ...], *operands: Any) -> Tensor:
    return reference.gated_batch_norm_transfer(*operands, *arguments)[0]


def _formula(*inputs: Any) -> tuple[Tensor, ...]:
    """The operator in plain PyTorch."""
    arguments = (*inputs[:-2], scale_of(*inputs[-2:]))
    return reference.gated_batch_norm_transfer(*arguments)


# No autocast rule: the norm is float32 whatever the map's dtype.
register(
    "gated_batch_norm_transfer",
    SCHEMA,
    _kernel,
    _fake,
    BACKWARD_SCHEMA,
    _backward_kernel,
    _backward_fake,
    _setup_context,
    _backward,
    autocast=False,
    formula=_formula,
)
