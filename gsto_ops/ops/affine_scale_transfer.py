"""``gsto_ops::affine_scale_transfer``: a per-channel affine, activation and resampling in one pass (batch norm's second half)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .autograd import differentiable_backward
from .library import RESAMPLING, empty_like_layout, layout_of, register, scale_of

SCHEMA = f"(Tensor input, Tensor scale, Tensor shift, str activation, SymInt[2] size, {RESAMPLING}) -> Tensor"
BACKWARD_SCHEMA = (
    f"(Tensor grad_output, Tensor input, Tensor scale, Tensor shift, str activation, {RESAMPLING}) -> "
    "(Tensor grad_input, Tensor grad_scale, Tensor grad_shift)"
)


def _kernel(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    size: tuple[int, int],
    mode: str,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> Tensor:
    factors = scale_of(scale_h, scale_w)
    output = reference.affine_scale_transfer(
        input, scale, shift, activation, (size[0], size[1]), mode, align_corners, factors
    )
    return output.contiguous(memory_format=layout_of(input))


def _backward_kernel(
    grad_output: Tensor,
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    mode: str,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> tuple[Tensor, ...]:
    factors = scale_of(scale_h, scale_w)
    grad_input, *grads = reference.affine_scale_transfer_backward(
        grad_output, input, scale, shift, activation, mode, align_corners, factors
    )
    return grad_input.contiguous(memory_format=layout_of(input)), *grads


def _fake(input: Tensor, scale: Tensor, shift: Tensor, activation: str, size: tuple[int, int], *others: Any) -> Tensor:
    return empty_like_layout(input, (*input.shape[:2], *size))


def _backward_fake(
    grad_output: Tensor, input: Tensor, scale: Tensor, shift: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return empty_like_layout(input, input.shape), scale.new_empty(scale.shape), shift.new_empty(shift.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(operator: Callable, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    operands = ctx.saved_tensors
    activation, size, mode, align_corners, scale_h, scale_w = ctx.options
    if torch.is_grad_enabled():
        function = partial(
            reference.affine_scale_transfer,
            activation=activation,
            size=size,
            mode=mode,
            align_corners=align_corners,
            scale_factors=scale_of(scale_h, scale_w),
        )
        return tuple(differentiable_backward(function, operands, ctx.needs_input_grad, (grad_output,)))
    return operator(grad_output, *operands, activation, mode, align_corners, scale_h, scale_w)


# No autocast rule: the map keeps its dtype, and the affine is float32 whatever the map's.
register(
    "affine_scale_transfer",
    SCHEMA,
    _kernel,
    _fake,
    BACKWARD_SCHEMA,
    _backward_kernel,
    _backward_fake,
    _setup_context,
    _backward,
    autocast=False,
    maps=("input",),
)
