"""From an image and its label to tensors, with the augmentation of the segmentation protocols.

Images are (H, W, 3) uint8 RGB, labels (H, W) uint8 with 255 for ignored pixels.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

IGNORE = 255
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet, RGB in [0, 1]
_STD = np.array([0.229, 0.224, 0.225], np.float32)


def normalize(image: np.ndarray) -> np.ndarray:
    """uint8 RGB -> float32 with ImageNet's mean 0 and standard deviation 1 in every channel."""
    return (image.astype(np.float32) / 255 - _MEAN) / _STD


def to_tensors(image: np.ndarray, label: np.ndarray) -> tuple[Tensor, Tensor]:
    """Normalised (H, W, 3) float32 and (H, W) uint8 -> (3, H, W) float32 and (H, W) int64."""
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)
    return torch.from_numpy(pixels), torch.from_numpy(label.astype(np.int64))


class EvalTransform:
    """Normalises; the geometry stays as it is."""

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        return to_tensors(normalize(image), label)


class TrainTransform:
    """Random scale, pad, random crop, random horizontal flip, normalise.

    Args:
        crop_size: (height, width) of the result; None keeps the image's own size, and scale and crop are skipped.
        base_size: length in pixels that the image's long side gets at scale 1.
        scale_steps: K of the scale 0.5 + randint(0, K) / 10, both ends included.
        flip: mirror left and right with probability 0.5.

    The padding (bottom and right, where the scaled image is smaller than the crop) is 0 after normalisation in the image
    and 255 in the label.

    Raises:
        ValueError: a size that is not positive, or a negative `scale_steps`.
    """

    def __init__(
        self, crop_size: tuple[int, int] | None, base_size: int = 480, scale_steps: int = 16, flip: bool = True
    ) -> None:
        if crop_size is not None and (len(crop_size) != 2 or min(crop_size) < 1):
            raise ValueError(f"crop_size must be (height, width) with both >= 1, got {tuple(crop_size)}")
        if base_size < 1:
            raise ValueError(f"base_size must be >= 1, got {base_size}")
        if scale_steps < 0:
            raise ValueError(f"scale_steps must be >= 0, got {scale_steps}")
        self.crop_size, self.base_size, self.scale_steps, self.flip = crop_size, base_size, scale_steps, flip

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        if self.crop_size is None:
            pixels = normalize(image)
        else:
            scale = 0.5 + rng.integers(0, self.scale_steps, endpoint=True) / 10
            image, label = resize_long_side(image, label, round(self.base_size * scale))
            pixels, label = pad(normalize(image), label, self.crop_size)
            top = rng.integers(0, label.shape[0] - self.crop_size[0], endpoint=True)
            left = rng.integers(0, label.shape[1] - self.crop_size[1], endpoint=True)
            window = np.s_[top : top + self.crop_size[0], left : left + self.crop_size[1]]
            pixels, label = pixels[window], label[window]
        if self.flip and rng.random() < 0.5:
            pixels, label = pixels[:, ::-1], label[:, ::-1]
        return to_tensors(pixels, label)


def resize_long_side(image: np.ndarray, label: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize so that the long side has `length` pixels: the image bilinearly, the label to the nearest pixel."""
    height, width = label.shape
    factor = length / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    return resized, cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)


def pad(pixels: np.ndarray, label: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pad bottom and right to at least `size` = (height, width): the image with 0, the label with 255."""
    bottom, right = (max(0, want - have) for want, have in zip(size, label.shape, strict=True))
    pixels = np.pad(pixels, ((0, bottom), (0, right), (0, 0)))
    return pixels, np.pad(label, ((0, bottom), (0, right)), constant_values=IGNORE)
