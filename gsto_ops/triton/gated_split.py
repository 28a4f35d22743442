"""``gated_split`` in Triton: one kernel over the branch each way, and a product per projection for its weight's gradient.

The projections of a branch share one reading of x in the forward pass and one for the gradient of x; the weights' gradients read
x once more for each of them (at most 3, on the smaller branches, whose maps stay in L2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.gated_split import new_carriers
from .launch import new_map
from .product import Gradient, weight_gradient
from .split import split_branch
from .split_backward import split_branch_backward


def forward(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    split: Sequence[int],
    copies: int,
    activation: str,
    carriers: int = 0,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    batch, channels, height, width = input.shape
    gates = gate_weight.shape[0]
    projected = [new_map(input, rows, height, width) for rows in split]
    gated = [new_map(input, channels, height, width) for _ in range(copies)]
    gate = input.new_empty((batch, gates, height, width))
    mean, var = (torch.empty(sum(split), dtype=torch.float32, device=input.device) for _ in range(2))
    split_branch(
        input,
        gate_weight.contiguous(),
        None if gate_bias is None else gate_bias.contiguous(),
        weight,
        gate,
        projected,
        gated,
        (mean, var),
        relu=activation == "relu",
    )
    return projected, gated + new_carriers(input, carriers), gate, mean, var


def backward(
    grad_projected: Sequence[Tensor],
    grad_gated: Sequence[Tensor],
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate = gate.contiguous()
    grad_input = new_map(input, *input.shape[1:])
    grad_gate_weight = torch.empty(gate_weight.shape, dtype=input.dtype, device=input.device)
    grad_gate_bias = input.new_empty(gate_weight.shape[0])
    grad_weight = torch.empty(0 if weight is None else weight.shape, dtype=input.dtype, device=input.device)
    split_branch_backward(
        grad_projected,
        grad_gated,
        None if grad_gate is None else grad_gate.contiguous(),
        input,
        gate,
        gate_weight.contiguous(),
        weight,
        relu=activation == "relu",
        grad_input=grad_input,
        grad_gate_weight=grad_gate_weight,
        grad_gate_bias=grad_gate_bias,
    )
    blocks = grad_weight.split([grad.shape[1] for grad in grad_projected]) if grad_projected else ()
    for k, (grad, block) in enumerate(zip(grad_projected, blocks, strict=True)):
        weight_gradient(Gradient(grad), input, gate[:, k : k + 1], block)
    return grad_input, grad_gate_weight, grad_gate_bias, grad_weight
