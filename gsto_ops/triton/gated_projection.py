"""``gated_projection`` in Triton: one kernel over the map each way, the statistics in its epilogue, and the weight's gradient."""

import torch
from torch import Tensor

from .gate import gate_backward
from .launch import identity, new_map
from .product import Gradient, project, weight_gradient


def forward(
    input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, height, width = input.shape
    output = new_map(input, weight.shape[0], height, width)
    gate = input.new_empty((batch, 1, height, width))
    mean, var = (torch.empty(weight.shape[0], dtype=torch.float32, device=input.device) for _ in range(2))
    project(
        input,
        weight,
        output,
        gate=gate,
        gate_weight=gate_weight.contiguous(),
        gate_bias=gate_bias,
        statistics=(mean, var),
    )
    return output, gate, mean, var


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz = Gradient(grad_output)
    if grad_mean is not None or grad_var is not None:
        grad_mean, grad_var = (None if g is None else g.contiguous() for g in (grad_mean, grad_var))
        dz = Gradient(grad_output, output, mean.contiguous(), grad_mean, grad_var)
    gate, rho = gate.contiguous(), gate_weight.contiguous()
    grad_input = new_map(input, *input.shape[1:])
    grad_gate_weight = torch.empty(gate_weight.shape, dtype=input.dtype, device=input.device)
    grad_weight = torch.empty(weight.shape, dtype=input.dtype, device=input.device)
    grad_gate_bias = input.new_empty(1)
    gate_backward(
        identity(input.shape[2:]),
        dz,
        input,
        gate,
        rho,
        None if grad_gate is None else grad_gate.contiguous(),
        weight=weight,
        grad_input=grad_input,
        grad_gate_weight=grad_gate_weight,
        grad_gate_bias=grad_gate_bias,
    )
    weight_gradient(dz, input, gate, grad_weight)
    return grad_input, grad_gate_weight, grad_gate_bias, grad_weight
