"""The segmentation loss: cross-entropy of every output at label size, optionally over the hardest pixels only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import gsto_ops

from .transforms import IGNORE


@dataclass(frozen=True)
class HardPixels:
    """Online hard example mining: which pixels of the main output count.

    Attributes:
        threshold: pixels whose true class has a probability below it.
        min_kept: and at least so many of a process' batch, the least probable ones (HRNet: 131,072 per GPU).

    Raises:
        ValueError: a threshold outside (0, 1], or `min_kept` under 1.
    """

    threshold: float = 0.9
    min_kept: int = 131_072

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"ohem_threshold must be in (0, 1], got {self.threshold}")
        if self.min_kept < 1:
            raise ValueError(f"ohem_min_kept must be >= 1, got {self.min_kept}")

    def select(self, losses: Tensor, labelled: Tensor) -> Tensor:
        """Choose by the pixels' unweighted cross-entropies -log(probability), of any shape -> bool of the same shape."""
        hard = losses > -math.log(self.threshold)
        spare = losses.numel() - self.min_kept
        if spare > 0:
            # ignored pixels have loss 0 and stand last; with fewer than min_kept labelled ones all of these are kept
            hard = hard | (losses >= losses.flatten().kthvalue(spare + 1).values)
        else:
            hard = torch.ones_like(hard)
        return hard & labelled


def segmentation_loss(
    outputs: Sequence[Tensor],
    labels: Tensor,
    weights: Sequence[float],
    class_weights: Tensor | None = None,
    hard_pixels: HardPixels | None = None,
) -> Tensor:
    """Weighted sum of the outputs' cross-entropies, each upsampled bilinearly to the label's size (paper, Section 4.1).

    Args:
        outputs: logit maps (N, C, h, w), the main one first.
        labels: (N, H, W) int64, 255 = ignored.
        weights: one factor per output; further ones are left unused (the plain network has only the main output).
        class_weights: (C,) float32, or None for equal weights. The loss is the weighted mean over the labelled pixels.
        hard_pixels: which pixels of the main output count, None for all. The auxiliary outputs keep all, as in HRNet.

    Returns:
        A float32 scalar; 0 when every pixel is ignored.

    Raises:
        ValueError: fewer weights than outputs.
    """
    if len(weights) < len(outputs):
        raise ValueError(f"loss_weights must have a factor for each of the {len(outputs)} outputs, got {list(weights)}")
    total = torch.zeros((), device=labels.device)
    for index, (logits, weight) in enumerate(zip(outputs, weights, strict=False)):
        if hard_pixels is not None and index == 0:
            loss = _hard_pixel_loss(logits, labels, class_weights, hard_pixels)
        else:
            loss = gsto_ops.upsample_cross_entropy(logits, labels, class_weights, ignore_index=IGNORE)
        total = total + weight * loss
    return total


def _hard_pixel_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None, hard_pixels: HardPixels) -> Tensor:
    losses = gsto_ops.upsample_cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    labelled = labels != IGNORE
    counts = hard_pixels.select(losses.detach(), labelled).to(losses.dtype)
    if class_weights is not None:
        counts = counts * class_weights[labels.where(labelled, 0)]
    return (losses * counts).sum() / counts.sum().clamp(min=1e-6)  # no labelled pixel: 0 / 1e-6 = 0 instead of 0 / 0
