"""Resampling: bilinear, nearest, adaptive average pooling, and its transpose (Eq. 3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
# The scale factors (of H, of W) that the caller gave, if any: like F.interpolate, bilinear and nearest resampling then step by
# 1 / scale factor and not by the ratio of the sizes.
ScaleFactors = tuple[float, float] | None


def scale_transfer(
    input: Tensor, size: tuple[int, int], mode: str, align_corners: bool = False, scale_factors: ScaleFactors = None
) -> Tensor:
    """ST of Eq. 3: resample (N, C, H, W) to (N, C, *size)."""
    if tuple(input.shape[-2:]) == tuple(size) and scale_factors in (None, (1.0, 1.0)):
        return input
    scale_h, scale_w = scale_factors or (None, None)
    if mode == "avg":
        return adaptive_pool(input, size)
    if mode == "bilinear":
        return aten.upsample_bilinear2d(input, size, align_corners, scale_h, scale_w)
    return aten.upsample_nearest2d(input, size, scale_h, scale_w)


def adaptive_pool(input: Tensor, size: tuple[int, int]) -> Tensor:
    """``F.adaptive_avg_pool2d``, in a form whose windows follow the input's size in an exported program too.

    ONNX has no adaptive pooling: converters freeze the windows that the example's size gives.
    """
    lengths = (*input.shape[-2:], *size)
    if not torch.compiler.is_exporting() or not any(isinstance(length, torch.SymInt) for length in lengths):
        return F.adaptive_avg_pool2d(input, size)
    rows, cols = (_pooling(i, o, input) for i, o in zip(input.shape[-2:], size, strict=True))
    return rows @ (input @ cols.mT)


def _pooling(inputs: int, outputs: int, like: Tensor) -> Tensor:
    """Adaptive pooling along one axis as a matrix (outputs, inputs)."""
    o, i = (torch.arange(count, device=like.device)[:, None] for count in (outputs, inputs))
    start, end = o * inputs // outputs, ((o + 1) * inputs + outputs - 1) // outputs
    inside = (i.mT >= start) & (i.mT < end)
    return inside.to(like.dtype) / (end - start).to(like.dtype)


def scale_transfer_backward(
    grad_output: Tensor,
    input_shape: Sequence[int],
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> Tensor:
    """Transpose of :func:`scale_transfer`: (N, C, H', W') to (N, C, H, W)."""
    size = tuple(grad_output.shape[-2:])
    shape = (*grad_output.shape[:2], *input_shape[-2:])
    if size == tuple(input_shape[-2:]) and scale_factors in (None, (1.0, 1.0)):
        return grad_output
    scale_h, scale_w = scale_factors or (None, None)
    if mode == "avg":
        return aten._adaptive_avg_pool2d_backward(grad_output, grad_output.new_empty(()).expand(shape))
    if mode == "bilinear":
        return aten.upsample_bilinear2d_backward(grad_output, size, shape, align_corners, scale_h, scale_w)
    return aten.upsample_nearest2d_backward(grad_output, size, shape, scale_h, scale_w)
