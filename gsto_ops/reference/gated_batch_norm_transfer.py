"""Gate, projection, batch norm with the batch's statistics, activation, resampling: two operators, the norm between them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .affine_scale_transfer import affine_scale_transfer
from .gated_projection import gated_projection
from .scale_transfer import ScaleFactors


def gated_batch_norm_transfer(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str,
    size: tuple[int, int],
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ST(act(BN(W(gate ⊙ F)))) (Eq. 1-3, Fig. 2): (output, projected map, gate, its mean, its biased variance)."""
    operands = (input, gate_weight, gate_bias, weight, norm_weight, norm_bias, eps)
    return forward_steps(
        gated_projection, affine_scale_transfer, *operands, activation, size, mode, align_corners, scale_factors
    )


def forward_steps(
    project: Callable,
    transfer: Callable,
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *resampling: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`gated_batch_norm_transfer` by the forward functions of any backend."""
    projected, gate, mean, var = project(input, gate_weight, gate_bias, weight)
    scale = norm_weight * (var + eps).rsqrt()
    return transfer(projected, scale, norm_bias - mean * scale, *resampling), projected, gate, mean, var


def backward_steps(
    project_backward: Callable,
    transfer_backward: Callable,
    grad_output: Tensor,
    input: Tensor,
    gate_weight: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    projected: Tensor,
    gate: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    *resampling: Any,
) -> tuple[Tensor, ...]:
    """The gradients for input, gate_weight, gate_bias, weight, norm_weight and norm_bias, by a backend's backward functions."""
    inverse = (var + eps).rsqrt()
    scale = norm_weight * inverse
    shift = norm_bias - mean * scale
    grad_projected, grad_scale, grad_shift = transfer_backward(grad_output, projected, scale, shift, *resampling)
    grad_scale = grad_scale - mean * grad_shift
    statistics = -grad_shift * scale, -0.5 * grad_scale * scale * inverse.square()
    operands = (input, gate, gate_weight, weight, projected, mean)
    return *project_backward(grad_projected, None, *statistics, *operands), grad_scale * inverse, grad_shift
