"""Equations 1-6 of the paper in plain PyTorch: the oracle of the tests, and what runs where no kernel is built.

These functions trust their arguments; ``gsto_ops.functional`` checks them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def scale_transfer(
    input: Tensor,
    size: tuple[int, int],
    mode: str,
    align_corners: bool = False,
    scale: tuple[float, float] | None = None,
) -> Tensor:
    """ST of Eq. 3: resample (N, C, H, W) to (N, C, *size).

    ``scale`` is the scale factor that the caller gave, if any: like ``F.interpolate``, bilinear and nearest resampling then
    step by 1 / scale and not by the ratio of the sizes.
    """
    if tuple(input.shape[-2:]) == tuple(size) and scale in (None, (1.0, 1.0)):
        return input
    scale_h, scale_w = scale or (None, None)
    if mode == "avg":
        return F.adaptive_avg_pool2d(input, size)
    if mode == "bilinear":
        return aten.upsample_bilinear2d(input, size, align_corners, scale_h, scale_w)
    return aten.upsample_nearest2d(input, size, scale_h, scale_w)


def scale_transfer_backward(
    grad_output: Tensor,
    input_shape: torch.Size,
    mode: str,
    align_corners: bool = False,
    scale: tuple[float, float] | None = None,
) -> Tensor:
    """Transpose of :func:`scale_transfer`: (N, C, H', W') to (N, C, H, W)."""
    size = tuple(grad_output.shape[-2:])
    shape = (*grad_output.shape[:2], *input_shape[-2:])
    if size == tuple(input_shape[-2:]) and scale in (None, (1.0, 1.0)):
        return grad_output
    scale_h, scale_w = scale or (None, None)
    if mode == "avg":
        return aten._adaptive_avg_pool2d_backward(grad_output, grad_output.new_empty(()).expand(shape))
    if mode == "bilinear":
        return aten.upsample_bilinear2d_backward(grad_output, size, shape, align_corners, scale_h, scale_w)
    return aten.upsample_nearest2d_backward(grad_output, size, shape, scale_h, scale_w)


def gated_scale_transfer(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    size: tuple[int, int],
    mode: str,
    align_corners: bool = False,
    scale: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Unsupervised GSTO (Eq. 1-3): gate = σ(ρ·F + b), ST(W(gate ⊙ F) + bias). Returns (output, gate)."""
    gate = F.conv2d(input, gate_weight, gate_bias).sigmoid()
    output = gate * input
    if weight is not None:
        output = F.conv2d(output, weight, bias)
    return scale_transfer(output, size, mode, align_corners, scale), gate


def gated_scale_transfer_backward(
    grad_output: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor | None,
    mode: str,
    align_corners: bool = False,
    scale: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_scale_transfer` for input, gate_weight, gate_bias, weight and bias.

    Needs only the input and the gate from the forward pass. The gradients of an absent weight and bias have no elements.
    """
    grad = scale_transfer_backward(grad_output, input.shape, mode, align_corners, scale)
    grad_weight, grad_bias = input.new_empty(0), input.new_empty(0)
    if weight is not None:
        grad_bias = grad.sum((0, 2, 3))
        grad_weight = torch.einsum("nohw,nchw->oc", grad, gate * input)[:, :, None, None]
        grad = torch.einsum("nohw,oc->nchw", grad, weight[:, :, 0, 0])
    grad_of_gate = (grad * input).sum(1, keepdim=True)
    if grad_gate is not None:
        grad_of_gate = grad_of_gate + grad_gate
    grad_logit = grad_of_gate * gate * (1 - gate)
    grad_input = gate * grad + gate_weight * grad_logit
    grad_gate_weight = (grad_logit * input).sum((0, 2, 3))[None, :, None, None]
    return grad_input, grad_gate_weight, grad_logit.sum((0, 1, 2, 3)).reshape(1), grad_weight, grad_bias


def supervised_gated_scale_transfer(
    input: Tensor,
    class_weight: Tensor,
    class_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    size: tuple[int, int],
    mode: str,
    align_corners: bool = False,
    scale: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Supervised GSTO (Eq. 4-6): P = W_cls F + b_c, gate = σ(θ·P + b), then as above. Returns (output, class_map, gate)."""
    class_map = F.conv2d(input, class_weight, class_bias)
    gate = F.conv2d(class_map, gate_weight, gate_bias).sigmoid()
    output = gate * input
    if weight is not None:
        output = F.conv2d(output, weight, bias)
    return scale_transfer(output, size, mode, align_corners, scale), class_map, gate
