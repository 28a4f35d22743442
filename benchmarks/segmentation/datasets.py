"""Datasets of (image, label, name), and the checks that run before training starts."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from .scenes import make_scene
from .transforms import IGNORE

cv2.setNumThreads(0)  # parallelism is between samples; OpenCV's own threads would fight with it

Transform = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[Tensor, Tensor]]
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


class DataError(ValueError):
    """The data cannot be trained on as asked; the message names the file or folder, or the number, that is wrong."""


class SegmentationDataset(Dataset, ABC):
    """Items are (image (3, H, W) float32, label (H, W) int64 with 255 = ignored, name)."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """The sample as it is stored: image (H, W, 3) uint8 RGB, label (H, W) uint8, name."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        image, label, name = self.read(index)
        # torch's generator is the one that every data-loading worker gets its own reproducible seed for
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
        return (*self.transform(image, label, rng), name)


class ScenesDataset(SegmentationDataset):
    """Embedded street scenes `first` ... `first + count - 1` of the series `seed`, painted once and kept in memory."""

    def __init__(self, first: int, count: int, seed: int, size: tuple[int, int], transform: Transform) -> None:
        super().__init__(transform)
        self.first = first
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            painted = pool.map(lambda i: make_scene(i, seed=seed, size=size), range(first, first + count))
            self.scenes = list(track(painted, f"Painting {count} scenes", total=count, transient=True))

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        return (*self.scenes[index], f"scene {self.first + index}")


class FolderDataset(SegmentationDataset):
    """Images of one folder and, of the same names, label PNGs of another.

    Args:
        images: folder of images.
        labels: folder of one-channel label images of the same sizes.
        num_classes: label values 0 .. num_classes - 1 are classes.
        void: this label value is ignored, and so is 255.
        transform: what makes tensors of image and label.

    Raises:
        DataError: a missing or empty folder, an image without label, a label without image.
    """

    def __init__(self, images: Path, labels: Path, num_classes: int, void: int, transform: Transform) -> None:
        super().__init__(transform)
        self.pairs = _pairs(images, labels)
        self.num_classes, self.void = num_classes, void

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        image_file, label_file = self.pairs[index]
        image = _decode(image_file, cv2.IMREAD_COLOR)[..., ::-1]
        label = _decode(label_file, cv2.IMREAD_UNCHANGED)
        if label.ndim != 2 or label.dtype != np.uint8:
            raise DataError(f"{label_file}: a label must have one 8-bit channel, got {label.shape} {label.dtype}")
        if label.shape != image.shape[:2]:
            sizes = " and ".join(f"{h}x{w}" for h, w in (image.shape[:2], label.shape))
            raise DataError(f"{image_file} and {label_file} must have one size, got {sizes} (height x width)")
        allowed = (label < self.num_classes) | (label == self.void) | (label == IGNORE)
        if not allowed.all():
            raise DataError(
                f"{label_file}: label value {int(label[~allowed][0])} is out of range; allowed are "
                f"0 to {self.num_classes - 1}, {self.void} (void) and {IGNORE} (ignored)"
            )
        label = np.where(label < self.num_classes, label, np.uint8(IGNORE))
        return np.ascontiguousarray(image), label, image_file.name

    def check(self) -> None:
        """Read every file once; the first bad one raises a DataError that names it."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(self._check_one, range(len(self))):
                pass

    def _check_one(self, index: int) -> None:
        self.read(index)


def _pairs(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    image_files, label_files = _files(images), _files(labels)
    for stem in sorted(image_files.keys() ^ label_files.keys()):
        if stem in image_files:
            raise DataError(f"{image_files[stem]} has no label: {labels / stem}.png is missing")
        raise DataError(f"{label_files[stem]} has no image of the same name in {images}")
    return [(image_files[stem], label_files[stem]) for stem in sorted(image_files)]


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix.lower() in _IMAGE_SUFFIXES}
    if not files:
        raise DataError(f"{folder}: no images in this folder (looked for {', '.join(_IMAGE_SUFFIXES)})")
    return files


def _decode(file: Path, flags: int) -> np.ndarray:
    # imdecode instead of imread: it reads names with any characters, and a missing file is Python's own error
    pixels = cv2.imdecode(np.fromfile(file, np.uint8), flags) if file.stat().st_size else None
    if pixels is None:
        raise DataError(f"{file}: not an image that can be read")
    return pixels
