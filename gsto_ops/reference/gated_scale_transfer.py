"""Unsupervised and supervised gated scale transfer (Eq. 1-6)."""

import torch.nn.functional as F
from torch import Tensor

from .parts import activate, gate_backward, projection_backward
from .scale_transfer import ScaleFactors, scale_transfer, scale_transfer_backward


def gated_scale_transfer(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    size: tuple[int, int],
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> tuple[Tensor, Tensor]:
    """Unsupervised GSTO (Eq. 1-3): gate = σ(ρ·F + b), ST(act(W(gate ⊙ F) + bias)). Returns (output, gate)."""
    gate = F.conv2d(input, gate_weight, gate_bias).sigmoid()
    output = gate * input
    if weight is not None:
        output = F.conv2d(output, weight, bias)
    return scale_transfer(activate(output, activation), size, mode, align_corners, scale_factors), gate


def gated_scale_transfer_backward(
    grad_output: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_scale_transfer` for input, gate_weight, gate_bias, weight and bias.

    Needs only the input and the gate from the forward pass. The gradients of an absent weight and bias have no elements.
    """
    grad = scale_transfer_backward(grad_output, input.shape, mode, align_corners, scale_factors)
    gated = gate * input
    if activation == "relu":
        grad = grad * ((gated if weight is None else F.conv2d(gated, weight, bias)) > 0)
    grad_weight, grad_bias = input.new_empty(0), input.new_empty(0)
    if weight is not None:
        grad_bias = grad.sum((0, 2, 3))
        grad, grad_weight = projection_backward(grad, gated, weight)
    return *gate_backward(grad, grad_gate, input, gate, gate_weight), grad_weight, grad_bias


def supervised_gated_scale_transfer(
    input: Tensor,
    class_weight: Tensor,
    class_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    size: tuple[int, int],
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Supervised GSTO (Eq. 4-6): P = W_cls F + b_c, gate = σ(θ·P + b), then as above. Returns (output, class_map, gate)."""
    class_map = F.conv2d(input, class_weight, class_bias)
    gate = F.conv2d(class_map, gate_weight, gate_bias).sigmoid()
    output = gate * input
    if weight is not None:
        output = F.conv2d(output, weight, bias)
    output = scale_transfer(activate(output, activation), size, mode, align_corners, scale_factors)
    return output, class_map, gate
