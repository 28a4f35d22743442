"""From images of any size to class maps, by an evaluation protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import gsto_ops

from .protocol import Protocol
from .transforms import scaled_size

Network = Callable[[Tensor], Tensor]


def predict(
    network: Network,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    protocol: Protocol,
    flip_pairs: Sequence[tuple[int, int]] = (),
) -> list[Tensor]:
    """The most likely class of every pixel.

    Args:
        network: images (N, 3, H, W) float32 -> logits (N, C, h, w), in eval mode.
        images: (N, 3, H, W) float32, normalised.
        sizes: the size (height, width) that each of the N class maps is to have: that of its label.
        protocol: how the network is applied; logits are resized and fused in float32, also under autocast.
        flip_pairs: classes that change places in the mirrored image.

    Returns:
        N class maps (height, width) int64.
    """
    scores: list[Tensor] = []
    for scale in protocol.scales:
        logits = _logits(network, images, scale, protocol, flip_pairs)
        for index, size in enumerate(sizes):  # one by one: labels differ in size, and full-size logits are large
            full = gsto_ops.scale_transfer(logits[index : index + 1], size=tuple(size))[0]
            if len(protocol.scales) > 1:
                full = full.softmax(0) if protocol.fuse == "softmax" else full.exp()
            if len(scores) == index:
                scores.append(full)
            else:
                scores[index] += full
    return [score.argmax(0) for score in scores]


def _logits(
    network: Network, images: Tensor, scale: float, protocol: Protocol, flip_pairs: Sequence[tuple[int, int]]
) -> Tensor:
    """Float32 logits of the scaled images: at the network's output size, or put together from windows, at the scaled size.

    Autocast touches the network only: everything else here keeps float32 under it.
    """
    height, width = images.shape[-2:]
    if protocol.long_side is not None:
        size = scaled_size((height, width), int(protocol.long_side * scale + 0.5))
    else:
        size = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    if size != (height, width):
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    if protocol.window is None or scale <= protocol.window_above:
        return _flipped_mean(network, images, protocol.flip, flip_pairs)
    window, stride = protocol.window, protocol.stride or protocol.window
    bottom, right = (max(0, want - have) for want, have in zip(window, size, strict=True))
    images = F.pad(images, (0, right, 0, bottom))
    total, count = None, torch.zeros(1, 1, *images.shape[-2:], device=images.device)
    for top in window_starts(images.shape[-2], window[0], stride[0]):
        for left in window_starts(images.shape[-1], window[1], stride[1]):
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = _flipped_mean(network, images[place], protocol.flip, flip_pairs)
            if total is None:
                total = logits.new_zeros(len(images), logits.shape[1], *images.shape[-2:])
            total[place] += gsto_ops.scale_transfer(logits, size=window)
            count[place] += 1
    return (total / count)[..., : size[0], : size[1]]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover 0 .. length - 1 in steps of at most `stride`; the last one ends with the image."""
    count = -(-(length - window) // stride) + 1
    return [min(index * stride, length - window) for index in range(count)]


def _flipped_mean(network: Network, images: Tensor, flip: bool, flip_pairs: Sequence[tuple[int, int]]) -> Tensor:
    logits = network(images).float()
    if not flip:
        return logits
    order = list(range(logits.shape[1]))
    for left, right in flip_pairs:
        order[left], order[right] = right, left
    mirrored = network(images.flip(-1)).float().flip(-1)[:, order]
    return (logits + mirrored) / 2
