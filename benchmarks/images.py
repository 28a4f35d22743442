"""Image files, and images as the networks of all tasks take them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from .errors import DataError

cv2.setNumThreads(0)  # parallelism is between samples; OpenCV's own threads would fight with it

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in [0, 1]
_STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32 with ImageNet's mean 0 and standard deviation 1 in every channel.

    The result's memory format is channels_last.
    """
    scale, shift = _normalization(images.device)
    return images.permute(0, 3, 1, 2).float().mul_(scale).sub_(shift)


@lru_cache
def _normalization(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (_MEAN, _STD))
    return (1 / (255 * std)).float().to(device), (mean / std).float().to(device)


def files_by_stem(folder: Path) -> dict[str, Path]:
    """The image files of a folder: name without suffix -> file.

    Raises:
        DataError: the folder is missing or has no images, or two of one name.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            if file.stem in files:
                raise DataError(f"{files[file.stem]} and {file} have one name: which of them is meant?")
            files[file.stem] = file
    if not files:
        raise DataError(f"{folder}: no images in this folder (looked for {', '.join(IMAGE_SUFFIXES)})")
    return files


def decode_image(file: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image file of any kind: grey and CMYK images are converted, transparency is dropped.

    Raises:
        DataError: the file is missing or broken.
    """
    return cv2.cvtColor(_decode(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def decode_label(file: Path, dtype: type[np.unsignedinteger] = np.uint8) -> np.ndarray:
    """The (H, W) values of a one-channel image file.

    Raises:
        DataError: the file is missing or broken, has several channels or another dtype.
    """
    label = _decode(file, cv2.IMREAD_UNCHANGED)
    if label.ndim != 2 or label.dtype != dtype:
        bits = 8 * np.dtype(dtype).itemsize
        raise DataError(f"{file}: a label must have one {bits}-bit channel, got {label.shape} {label.dtype}")
    return label


def _decode(file: Path, flags: int) -> np.ndarray:
    # imdecode instead of imread: it reads names with any characters, and a missing file is told from a broken one
    try:
        content = np.fromfile(file, np.uint8)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    pixels = cv2.imdecode(content, flags) if content.size else None
    if pixels is None:
        raise DataError(f"{file}: not an image that can be read")
    return pixels


def write_png(file: Path, pixels: np.ndarray) -> None:
    """Write an image (H, W, 3) RGB or a label (H, W), uint8; folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if pixels.ndim == 3:
        pixels = np.ascontiguousarray(pixels[..., ::-1])
    cv2.imencode(".png", pixels)[1].tofile(file)
