"""Gate and projection with batch statistics (Eq. 1, 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import gate_backward, projection_backward, statistics_dtype


def gated_projection(
    input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = W(gate ⊙ F) at the input's size (Eq. 1, 2) and its statistics: (z, gate, mean, biased variance over N, H, W)."""
    gate = F.conv2d(input, gate_weight, gate_bias).sigmoid()
    output = F.conv2d(gate * input, weight)
    var, mean = torch.var_mean(output.to(statistics_dtype(input)), (0, 2, 3), correction=0)
    return output, gate, mean, var


def gated_projection_backward(
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
    """Gradients of :func:`gated_projection` for input, gate_weight, gate_bias and weight."""
    grad = grad_output.to(mean.dtype)
    count = output.shape[0] * output.shape[2] * output.shape[3]
    if grad_mean is not None:
        grad = grad + (grad_mean / count)[:, None, None]
    if grad_var is not None:
        grad = grad + (2 / count * grad_var)[:, None, None] * (output - mean[:, None, None])
    grad, grad_weight = projection_backward(grad.to(input.dtype), gate * input, weight)
    return *gate_backward(grad, grad_gate, input, gate, gate_weight), grad_weight
