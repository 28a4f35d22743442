"""The pose loss: squared distance of every output's heatmaps from the Gaussians of the joints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .codec import encode


def pose_loss(outputs: Sequence[Tensor], joints: Tensor, weights: Sequence[float], sigma: float) -> Tensor:
    """Weighted sum over the outputs of the mean over joints of 0.5 x MSE (paper, Section 4.3).

    A joint with weight 0 counts as a perfect one, as in HRNet's code: the mean is over all joints, samples and pixels.

    Args:
        outputs: heatmaps (N, 17, h, w), the network's main ones first, then those of its gated transitions.
        joints: (N, 17, 3) x and y in pixels of the input, and weights; see `encode`.
        weights: one factor per output; further ones are left unused.
        sigma: of the Gaussians, in pixels of the heatmap.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: fewer weights than outputs.
    """
    if len(weights) < len(outputs):
        raise ValueError(f"loss_weights must have a factor for each of the {len(outputs)} outputs, got {list(weights)}")
    targets, counted = encode(joints, (outputs[0].shape[-2], outputs[0].shape[-1]), sigma)
    counted = counted[..., None, None]
    total = torch.zeros((), device=joints.device)
    for heatmaps, weight in zip(outputs, weights, strict=False):
        total = total + weight * 0.5 * (((heatmaps.float() - targets) * counted) ** 2).mean()
    return total
