"""From an image and its label to tensors, with the augmentation of the segmentation protocols.

Images are (H, W, 3) uint8 RGB, labels (H, W) uint8 with 255 for ignored pixels. They stay 8-bit until they are on the
network's device (`images.normalize`). As float32 and int64 the five times larger batches, allocated, copied and passed on, took
a loading process LIP 7.0 instead of 3.0 ms per image, and Cityscapes 65 instead of 40.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

IGNORE = 255
PADDING = (124, 116, 104)  # the mean in 8 bits: within 0.01 of the 0 that normalised images are to be padded with


def scaled_size(size: Sequence[int], long_side: int) -> tuple[int, int]:
    """(height, width) -> the size of the same shape whose long side is `long_side`, each rounded half up and at least 1."""
    factor = long_side / max(size)
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


class EvalTransform:
    """Leaves everything as it is, but for:

    Args:
        squash: (height, width) that every image is resized to, whatever its shape; None leaves it as it is. The label stays.
    """

    def __init__(self, squash: tuple[int, int] | None = None) -> None:
        self.squash = squash

    def __call__(self, image: np.ndarray, label: np.ndarray) -> tuple[Tensor, Tensor]:
        if self.squash is not None:
            image = cv2.resize(image, self.squash[::-1], interpolation=cv2.INTER_LINEAR)
        return torch.from_numpy(image), torch.from_numpy(label)


class TrainTransform:
    """Random scale, pad, random crop, random horizontal flip.

    Args:
        crop_size: (height, width) of the result; None keeps the image's own size, and scale and crop are skipped.
        base_size: length in pixels that the image's long side gets at scale 1.
        scale_steps: K of the scale 0.5 + randint(0, K) / 10, both ends included.
        flip: mirror left and right with probability 0.5.
        squash: (height, width) that counts as the image's size, whatever its shape; None for its own size.
        flip_pairs: classes that a flip swaps, such as left and right arm.

    The padding (bottom and right, where the scaled image is smaller than the crop) is `PADDING` in the image, which is 0 after
    normalisation, and 255 in the label; a flip comes last and brings it to the left. Squash, scale, crop and flip are one
    interpolation of the pixels that the crop shows: bilinear in the image, nearest in the label, both with half-pixel centres.

    Raises:
        ValueError: a size that is not positive, or a negative `scale_steps`.
    """

    def __init__(
        self,
        crop_size: tuple[int, int] | None,
        base_size: int = 480,
        scale_steps: int = 16,
        flip: bool = True,
        squash: tuple[int, int] | None = None,
        flip_pairs: Sequence[tuple[int, int]] = (),
    ) -> None:
        for name, size in (("crop_size", crop_size), ("squash", squash)):
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise ValueError(f"{name} must be (height, width) with both >= 1, got {tuple(size)}")
        if base_size < 1:
            raise ValueError(f"base_size must be >= 1, got {base_size}")
        if scale_steps < 0:
            raise ValueError(f"scale_steps must be >= 0, got {scale_steps}")
        self.crop_size, self.base_size, self.scale_steps, self.flip = crop_size, base_size, scale_steps, flip
        self.squash = squash
        self.swap = np.arange(256, dtype=np.uint8)
        for left, right in flip_pairs:
            self.swap[left], self.swap[right] = right, left

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        height, width = size = label.shape
        crop, top, left = self.crop_size or size, 0, 0
        if self.crop_size is not None:
            scale = 0.5 + rng.integers(0, self.scale_steps, endpoint=True) / 10
            size = scaled_size(self.squash or size, int(self.base_size * scale + 0.5))
            top, left = (
                int(rng.integers(0, max(0, have - want), endpoint=True)) for have, want in zip(size, crop, strict=True)
            )
        flip = bool(self.flip and rng.random() < 0.5)
        # What the crop shows of the scaled image; the rest is padding.
        rows, columns = min(crop[0], size[0] - top), min(crop[1], size[1] - left)
        y, x = top + np.arange(rows), left + np.arange(columns)
        step_y, step_x = height / size[0], width / size[1]
        toward, start = step_x, 0
        if flip:
            x, toward, start = x[::-1], -step_x, crop[1] - columns
        source_y, source_x = ((y + 0.5) * step_y).astype(np.intp), ((x + 0.5) * step_x).astype(np.intp)
        classes = label[source_y][:, source_x]
        matrix = np.array([[toward, 0, (x[0] + 0.5) * step_x - 0.5], [0, step_y, (top + 0.5) * step_y - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        pixels = cv2.warpAffine(image, matrix, (columns, rows), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        if flip:
            classes = cv2.LUT(classes, self.swap)
        if (rows, columns) != tuple(crop):
            margins = (0, crop[0] - rows, start, crop[1] - columns - start)
            pixels = cv2.copyMakeBorder(pixels, *margins, cv2.BORDER_CONSTANT, value=PADDING)
            classes = cv2.copyMakeBorder(classes, *margins, cv2.BORDER_CONSTANT, value=IGNORE)
        return torch.from_numpy(pixels), torch.from_numpy(classes)
