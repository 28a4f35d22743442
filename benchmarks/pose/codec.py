"""Joints as heatmaps, and back.

The convention, everywhere: heatmap pixel (i, j) stands for the input's point (4 i, 4 j), x before y, where 4 is the network's
stride and a pixel's centre has integer coordinates.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDE = 4
DECODINGS = ("quarter", "dark")


def encode(joints: Tensor, size: tuple[int, int], sigma: float) -> tuple[Tensor, Tensor]:
    """The heatmaps that a network is to learn: an unnormalised Gaussian (peak 1) around every joint, cut off after 3 sigma.

    The Gaussian's centre is a pixel, int(x / 4 + 0.5). The square that it fills has 6 sigma + 1 pixels a side: 19 for sigma 3.

    Args:
        joints: (..., 3) x and y in pixels of the network's input, and a weight, 0 for a joint that is not labelled.
        size: (height, width) of the heatmaps, a quarter of the input's.
        sigma: of the Gaussian, in pixels of the heatmap.

    Returns:
        Heatmaps (..., height, width) float32, and the joints' weights (...) float32: 0 also where nothing of the Gaussian's
        square is on the map.
    """
    centers = torch.trunc(joints[..., :2].float() / STRIDE + 0.5)
    radius = int(3 * sigma)
    last = centers.new_tensor([size[1] - 1, size[0] - 1])
    weights = joints[..., 2].float() * ((centers + radius >= 0) & (centers - radius <= last)).all(-1)
    x, y = _profile(centers[..., 0], size[1], sigma, radius), _profile(centers[..., 1], size[0], sigma, radius)
    return y.unsqueeze(-1) * (x * (weights > 0).unsqueeze(-1)).unsqueeze(-2), weights


def _profile(centers: Tensor, length: int, sigma: float, radius: int) -> Tensor:
    distances = torch.arange(length, device=centers.device) - centers.unsqueeze(-1)
    return torch.exp(-(distances**2) / (2 * sigma**2)) * (distances.abs() <= radius)


def decode(
    heatmaps: Tensor, decoding: Literal["quarter", "dark"] = "quarter", sigma: float = 3
) -> tuple[Tensor, Tensor]:
    """Where the heatmaps are highest.

    Args:
        heatmaps: (N, K, height, width).
        decoding: what the maximum's pixel is refined by. "quarter": a quarter pixel towards the higher neighbour, in x and in
            y. "dark": a Taylor step of the logarithm of the smoothed heatmap (arXiv 1910.06278). Both leave maxima at the map's
            border (two pixels wide, as in HRNet's code) where they are.
        sigma: of the Gaussian that the network learned, for "dark".

    Returns:
        Points (N, K, 2) float32, x and y in heatmap pixels, and scores (N, K), the maxima. A map without any positive value
        has its point at (0, 0).

    Raises:
        ValueError: an unknown decoding.
    """
    if decoding not in DECODINGS:
        raise ValueError(f"decoding must be one of {DECODINGS}, got {decoding!r}")
    heatmaps = heatmaps.float()
    height, width = heatmaps.shape[-2:]
    scores, places = heatmaps.flatten(-2).max(-1)
    places = places * (scores > 0)
    x, y = places % width, places // width
    points = torch.stack([x, y], -1).float()
    if decoding == "dark":
        return points + _taylor_step(_smooth(heatmaps, sigma), x, y), scores
    inside = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)

    def value(dx: int, dy: int) -> Tensor:
        return _look_up(heatmaps, x + dx, y + dy)

    slopes = torch.stack([value(1, 0) - value(-1, 0), value(0, 1) - value(0, -1)], -1)
    return points + 0.25 * slopes.sign() * inside.unsqueeze(-1), scores


def _look_up(heatmaps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Values (N, K) at pixels, those outside the map being taken at its border."""
    height, width = heatmaps.shape[-2:]
    places = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    return heatmaps.flatten(-2).gather(-1, places.unsqueeze(-1)).squeeze(-1)


def _smooth(heatmaps: Tensor, sigma: float) -> Tensor:
    """Heatmaps blurred by a Gaussian of the same sigma, with their old maxima: a network's map has more than one peak."""
    radius = int(3 * sigma) - 1
    kernel = torch.exp(-(torch.arange(-radius, radius + 1, device=heatmaps.device).float() ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    blurred = heatmaps.flatten(0, 1).unsqueeze(1)
    with torch.autocast(heatmaps.device.type, enabled=False):  # the differences of neighbours would drown in bfloat16
        blurred = F.conv2d(blurred, kernel, padding=(radius, 0))
        blurred = F.conv2d(blurred, kernel.transpose(2, 3), padding=(0, radius)).view_as(heatmaps)
    before, after = (maps.amax((-2, -1), keepdim=True) for maps in (heatmaps, blurred))
    return blurred * before / after.clamp(min=1e-10)


def _taylor_step(heatmaps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """From the pixel of the maximum to that of the parabola through the logarithm's values around it."""
    height, width = heatmaps.shape[-2:]
    logs = heatmaps.clamp(min=1e-10).log().double()

    def value(dx: int, dy: int) -> Tensor:
        return _look_up(logs, x + dx, y + dy)

    # second differences over two pixels, as in the paper's code: over one, they are mostly noise
    slope_x, slope_y = (value(1, 0) - value(-1, 0)) / 2, (value(0, 1) - value(0, -1)) / 2
    xx = (value(2, 0) - 2 * value(0, 0) + value(-2, 0)) / 4
    yy = (value(0, 2) - 2 * value(0, 0) + value(0, -2)) / 4
    xy = (value(1, 1) - value(1, -1) - value(-1, 1) + value(-1, -1)) / 4
    determinant = xx * yy - xy**2
    usable = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2) & (determinant != 0)
    determinant = determinant.where(usable, 1.0)
    step = torch.stack([xy * slope_y - yy * slope_x, xy * slope_x - xx * slope_y], -1) / determinant.unsqueeze(-1)
    return (step * usable.unsqueeze(-1)).float()
