"""Cross-entropy of bilinearly upsampled logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import statistics_dtype
from .scale_transfer import scale_transfer, scale_transfer_backward


def upsample_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, align_corners: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of logits (N, C, h, w), upsampled to the labels' size, with labels (N, H, W) (Section 4.1).

    Returns (loss, logsumexp, mass): the loss () or (N, H, W), the log-sum-exp of the upsampled logits (N, H, W), and for
    "mean" the summed class weights of the labelled pixels (), by which the sum is divided (no elements otherwise).
    """
    logits = scale_transfer(
        input.to(statistics_dtype(input)), (target.shape[1], target.shape[2]), "bilinear", align_corners
    )
    label = target.long()
    loss = F.cross_entropy(logits, label, weight, ignore_index=ignore_index, reduction="none")
    mass = loss.new_empty(0)
    if reduction == "mean":
        mass = _pixel_weights(label, weight, ignore_index, loss.dtype).sum()
        loss = loss.sum() / _divisor(mass)
    elif reduction == "sum":
        loss = loss.sum()
    return loss, logits.detach().logsumexp(1), mass


def _pixel_weights(label: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """The class weight of each pixel's label, 0 where the pixel is ignored."""
    labelled = label != ignore_index
    if weight is None:
        return labelled.to(dtype)
    return weight[label.where(labelled, 0)].where(labelled, 0)


def _divisor(mass: Tensor) -> Tensor:
    """What "mean" divides by: without a labelled pixel 1, so that the loss is 0 and not 0 / 0."""
    return mass.where(mass != 0, 1)


def upsample_cross_entropy_backward(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logsumexp: Tensor,
    mass: Tensor,
    ignore_index: int,
    reduction: str,
    align_corners: bool = False,
) -> Tensor:
    """Gradient of :func:`upsample_cross_entropy` for input; grad_loss is () or, for "none", (N, H, W)."""
    logits = scale_transfer(input.to(logsumexp.dtype), (target.shape[1], target.shape[2]), "bilinear", align_corners)
    label = target.long()
    if reduction == "mean":
        grad_loss = grad_loss / _divisor(mass)
    factor = (grad_loss * _pixel_weights(label, weight, ignore_index, logsumexp.dtype))[:, None]
    grad = (logits - logsumexp[:, None]).exp() * factor
    grad = grad.scatter_add(1, label.where(label != ignore_index, 0)[:, None], -factor)
    return scale_transfer_backward(grad, input.shape, "bilinear", align_corners).to(input.dtype)
