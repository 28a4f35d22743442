"""``upsample_cross_entropy``: the loss of a network whose logits are smaller than its labels."""

from typing import Literal

import torch
from torch import Tensor

from . import checks, reference
from .functional import _operators

TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")


def upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    align_corners: bool = False,
) -> Tensor:
    """Cross-entropy of logits that are upsampled bilinearly to the labels' size (arXiv 2005.13363, Section 4.1).

    ``F.cross_entropy(F.interpolate(input, size=target.shape[-2:], mode="bilinear", align_corners=align_corners), target, weight,
    ignore_index=ignore_index, reduction=reduction)`` without the full-resolution logits and their gradient in memory. Smaller
    and equal sizes of the labels work too. Interpolation and log-sum-exp are computed in float32 (float64 for float64).

    A deep-supervised network calls this once per head: what one call for all heads would save, the reading of the labels, is 8
    microseconds per further head and pass on an H200 for a batch of 8 x 512x1024 int64 labels; uint8 labels save 7 of the 8.

    Args:
        input: logits (N, C, h, w), float32, float64, bfloat16 or float16, any strides; N may be 0.
        target: labels (N, H, W), int64, int32 or uint8: classes 0 to C - 1, or ignore_index.
        weight: (C,) weights of the classes, float32 (float64 for float64 input), or None for 1. A constant: it gets no gradient.
        ignore_index: label of the pixels that neither the loss nor its gradient sees.
        reduction: ``"mean"``: the sum over the labelled pixels of weighted losses, divided by the sum of their weights; 0 with
            zero gradients where no pixel is labelled (F.cross_entropy: NaN). ``"sum"``: the sum. ``"none"``: each pixel's
            weighted loss, 0 where ignored; what hard-example mining selects from.
        align_corners: as in ``F.interpolate``.

    Returns:
        () or, for ``"none"``, (N, H, W), in float32 (float64 for float64 input), under autocast too.

    Raises:
        ValueError, TypeError: arguments that cannot work. IndexError: on a CPU, a label outside of 0 to C - 1 that is not
        ignore_index. On a GPU, where looking would wait for the device, the kernels make the loss of such a pixel NaN and with it
        the sum and the mean; the reference backend raises torch's own device-side assertion there.
    """
    checks.check_input(input)
    check_target(target, input)
    dtype = reference.statistics_dtype(input)
    checks.check_parameter("weight", weight, (input.shape[1],), input, meaning="(classes,)", dtype=dtype)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    checks.check_mode("bilinear", align_corners)
    functions = _operators("upsample_cross_entropy", input) or reference
    loss, _, _ = functions.upsample_cross_entropy(input, target, weight, ignore_index, reduction, align_corners)
    return loss


def check_target(target: Tensor, input: Tensor) -> None:
    """``target`` is a map of labels (N, H, W) that belongs to the logits."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(f"target must be {', '.join(str(dtype) for dtype in TARGET_DTYPES)}, got {target.dtype}")
    if target.dim() != 3 or target.shape[0] != input.shape[0] or 0 in target.shape[1:]:
        raise ValueError(
            f"target must have shape ({input.shape[0]}, H, W) with H, W > 0 for input of shape {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )
    if target.device != input.device:
        raise ValueError(f"target must be on the device of input, {input.device}, got {target.device}")
