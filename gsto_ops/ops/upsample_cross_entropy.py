"""``gsto_ops::upsample_cross_entropy``: bilinear upsampling of class logits and cross-entropy (Section 4.1).

The backward pass gets the low-resolution logits, the labels and the log-sum-exp of every pixel. Without the latter it would
have to interpolate all classes twice, and could not work on the classes in independent chunks. Bytes of one head of the W48
Cityscapes step, logits 8 x 19 x 128 x 256 in bfloat16 (10.0 MB), labels 8 x 512 x 1024 (33.6 MB as int64, 4.2 MB as uint8),
log-sum-exp 16.8 MB:

=====================  ====================================  =============  ======================
form                   forward + backward, int64 (uint8)     kept           exp per pixel and class
=====================  ====================================  =============  ======================
log-sum-exp kept       60.3 + 70.3 = 130.6 MB (71.8 MB)      16.8 MB        2
recomputed             43.5 + 53.5 = 97.0 MB (38.3 MB)       nothing        3
two steps, in float32  about 2,600 MB                        319 MB         2
=====================  ====================================  =============  ======================

The 33.6 MB that recomputing saves are 8 microseconds of an H200's bandwidth; 80 million exponentials are 22 of its arithmetic.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .autograd import differentiable_backward
from .library import empty_like_layout, layout_of, register

SCHEMA = (
    "(Tensor input, Tensor target, Tensor? weight, int ignore_index, str reduction, bool align_corners) -> "
    "(Tensor loss, Tensor logsumexp, Tensor mass)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor logsumexp, Tensor mass, int ignore_index, "
    "str reduction, bool align_corners) -> Tensor"
)


def _kernel(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss, logsumexp, mass = reference.upsample_cross_entropy(
        input, target, weight, ignore_index, reduction, align_corners
    )
    return loss.contiguous(), logsumexp.contiguous(), mass


def _backward_kernel(grad_loss: Tensor, input: Tensor, *others: Any) -> Tensor:
    grad_input = reference.upsample_cross_entropy_backward(grad_loss, input, *others)
    return grad_input.contiguous(memory_format=layout_of(input))


def _fake(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.statistics_dtype(input)
    return (
        input.new_empty(target.shape if reduction == "none" else (), dtype=dtype),
        input.new_empty(target.shape, dtype=dtype),
        input.new_empty(() if reduction == "mean" else (0,), dtype=dtype),
    )


def _backward_fake(grad_loss: Tensor, input: Tensor, *others: Any) -> Tensor:
    return empty_like_layout(input, input.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, target, weight, *ctx.options = inputs
    _, logsumexp, mass = output
    ctx.mark_non_differentiable(logsumexp, mass)
    ctx.save_for_backward(input, target, weight, logsumexp, mass)
    ctx.set_materialize_grads(False)


def _backward(operator: Callable, ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    input, target, weight, logsumexp, mass = ctx.saved_tensors
    if grad_loss is None:
        return None, None, None
    if torch.is_grad_enabled():
        loss_of = lambda x: reference.upsample_cross_entropy(x, target, weight, *ctx.options)[0]  # noqa: E731
        return *differentiable_backward(loss_of, (input,), ctx.needs_input_grad, (grad_loss,)), None, None
    return operator(grad_loss, input, target, weight, logsumexp, mass, *ctx.options), None, None


# No autocast rule: the loss is float32 whatever the logits' dtype, and the logits are never written at full resolution.
register(
    "upsample_cross_entropy",
    SCHEMA,
    _kernel,
    _fake,
    BACKWARD_SCHEMA,
    _backward_kernel,
    _backward_fake,
    _setup_context,
    _backward,
    autocast=False,
)
