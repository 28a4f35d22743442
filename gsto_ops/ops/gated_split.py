"""``gsto_ops::gated_split``: all that leaves one branch of a gated fusion, from one read (Eq. 1, 2, 4; Section 3.2.1).

K gates of the branch; for the first of them, the gated projections to finer branches, with their batch statistics; for the
next ``copies``, the gated copies that the strided convolutions to coarser branches read; further gates are only computed. No
gradient flows through the statistics: ``batch_norm_sum`` accounts for it.

The first ``carriers`` of the further gates have a copy that is not written, as ``batch_norm_sum`` multiplies by the gate itself:
its place in ``gated`` is taken by a map of zeros that is one element in memory. What ``batch_norm_sum`` returns as this map's
gradient is the gradient of the copy, which joins those of the other copies in the one pass over the input.

With ReLU on the logits a gate of 0.5 is one whose ReLU is closed. So is, in bfloat16, a gate that rounds to 0.5: the gradient of
logits between 0 and 0.004 is left out.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .autograd import differentiable_backward
from .library import empty_like_layout, layout_of, register

SCHEMA = (
    "(Tensor input, Tensor gate_weight, Tensor? gate_bias, Tensor? weight, SymInt[] split, int copies, str activation, "
    "int carriers=0) -> (Tensor[] projected, Tensor[] gated, Tensor gate, Tensor mean, Tensor var)"
)
BACKWARD_SCHEMA = (
    "(Tensor[] grad_projected, Tensor[] grad_gated, Tensor? grad_gate, Tensor input, Tensor gate, Tensor gate_weight, "
    "Tensor? weight, str activation) -> "
    "(Tensor grad_input, Tensor grad_gate_weight, Tensor grad_gate_bias, Tensor grad_weight)"
)
Outputs = tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]


def _kernel(input: Tensor, *operands: Any) -> Outputs:
    operands, carriers = operands[:6], operands[6:]
    projected, gated, gate, mean, var = reference.gated_split(input, *operands)
    layout = layout_of(input)
    projected, gated = ([x.contiguous(memory_format=layout) for x in maps] for maps in (projected, gated))
    return projected, gated + new_carriers(input, *carriers), gate.contiguous(), mean, var


def new_carriers(input: Tensor, count: int = 0) -> list[Tensor]:
    """Zeros of the shape of ``input`` that are one element in memory."""
    return [input.new_zeros(()).expand(input.shape) for _ in range(count)]


def _backward_kernel(*operands: Any) -> tuple[Tensor, ...]:
    grad_input, *grads = reference.gated_split_backward(*operands)
    return grad_input.contiguous(memory_format=layout_of(operands[3])), *(grad.contiguous() for grad in grads)


def _fake(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    split: Sequence[int],
    copies: int,
    activation: str,
    carriers: int = 0,
) -> Outputs:
    batch, _, height, width = input.shape
    gates, rows = gate_weight.shape[0], sum(split)
    projected = [empty_like_layout(input, (batch, channels, height, width)) for channels in split]
    gated = [empty_like_layout(input, input.shape) for _ in range(copies)] + new_carriers(input, carriers)
    mean, var = (input.new_empty(rows, dtype=reference.statistics_dtype(input)) for _ in range(2))
    return projected, gated, input.new_empty((batch, gates, height, width)), mean, var


def _backward_fake(
    grad_projected: Sequence[Tensor],
    grad_gated: Sequence[Tensor],
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor | None,
    activation: str,
) -> tuple[Tensor, ...]:
    return (
        empty_like_layout(input, input.shape),
        input.new_empty(gate_weight.shape),
        input.new_empty(gate_weight.shape[0]),
        input.new_empty(0 if weight is None else weight.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    input, gate_weight, gate_bias, weight, ctx.split, copies, ctx.activation, *carriers = inputs
    ctx.copies = copies + sum(carriers)
    ctx.options = len(inputs) - 4
    # Neither projections nor gated copies nor gates: all of it can be made again from the input.
    ctx.save_for_backward(input, gate_weight, gate_bias, weight)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(
    operator: Any,
    ctx: Any,
    grad_projected: Sequence[Tensor | None],
    grad_gated: Sequence[Tensor | None],
    grad_gate: Tensor | None,
    *grads_of_statistics: None,
) -> tuple[Any, ...]:
    input, gate_weight, gate_bias, weight = ctx.saved_tensors
    grads = (*grad_projected, *grad_gated, grad_gate)
    no_grads = (None,) * ctx.options
    if all(grad is None for grad in grads):
        return (None,) * 4 + no_grads
    if torch.is_grad_enabled():
        split = partial(reference.gated_split, split=ctx.split, copies=ctx.copies, activation=ctx.activation)

        def function(*operands: Any) -> tuple[Tensor, ...]:
            projected, gated, gates, _, _ = split(*operands)
            return *projected, *gated, gates

        operands = (input, gate_weight, gate_bias, weight)
        return *differentiable_backward(function, operands, ctx.needs_input_grad, grads), *no_grads
    forward = getattr(torch.ops, operator.namespace).gated_split.default
    _, _, gate, _, _ = forward(input, gate_weight, gate_bias, None, [], 0, ctx.activation)
    zero = input.new_zeros(())
    batch, channels, height, width = input.shape
    found = operator(
        [
            zero.expand(batch, rows, height, width) if grad is None else grad
            for grad, rows in zip(grad_projected, ctx.split, strict=True)
        ],
        [zero.expand(batch, channels, height, width) if grad is None else grad for grad in grad_gated],
        grad_gate,
        input,
        gate,
        gate_weight,
        weight,
        ctx.activation,
    )
    present = (True, True, gate_bias is not None, weight is not None)
    return *(grad if there else None for grad, there in zip(found, present, strict=True)), *no_grads


register(
    "gated_split",
    SCHEMA,
    _kernel,
    _fake,
    BACKWARD_SCHEMA,
    _backward_kernel,
    _backward_fake,
    _setup_context,
    _backward,
)
