"""Datasets of (image, label, name)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from ..images import decode_image, decode_label, files_by_stem
from ..sampling import Draw
from .scenes import make_scene
from .transforms import IGNORE, EvalTransform, TrainTransform

INVALID = 254  # in a label table: a value that no label file may have


class Pair(NamedTuple):
    """An image file, its label file (None where there is none) and the name that the sample goes by."""

    image: Path
    label: Path | None
    name: str


class Found(NamedTuple):
    """The files of a split: pairs, and a line for each file without its partner."""

    pairs: list[Pair]
    problems: list[str]


class SegmentationDataset(Dataset, ABC):
    """Items are (image (H, W, 3) uint8 RGB, label (H, W) uint8 with 255 = ignored, name).

    `dataset[index]` is the sample as evaluation sees it. `dataset[Draw(index, seed)]` is augmented, by `seed` alone: who asks,
    and in what order, makes no difference.

    Args:
        augment: what makes tensors of a drawn sample.
        plain: what makes tensors of a sample that is not augmented.
    """

    def __init__(self, augment: TrainTransform | None = None, plain: EvalTransform | None = None) -> None:
        self.augment, self.plain = augment or TrainTransform(crop_size=None), plain or EvalTransform()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """The sample as it is stored: image (H, W, 3) uint8 RGB, label (H, W) uint8, name."""

    def __getitem__(self, item: int | Draw) -> tuple[Tensor, Tensor, str]:
        if isinstance(item, Draw):
            image, label, name = self.read(item.index)
            return (*self.augment(image, label, np.random.default_rng(item.seed)), name)
        image, label, name = self.read(item)
        return (*self.plain(image, label), name)


class ScenesDataset(SegmentationDataset):
    """Embedded street scenes `first` ... `first + count - 1` of the series `seed`, painted once and kept in memory."""

    def __init__(self, first: int, count: int, seed: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.first = first
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            painted = pool.map(lambda i: make_scene(i, seed=seed, size=size), range(first, first + count))
            self.scenes = list(track(painted, f"Painting {count} scenes", total=count, transient=True))

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        return (*self.scenes[index], f"scene {self.first + index}")


class PairDataset(SegmentationDataset):
    """Image files and label files.

    Args:
        pairs: the files. The label of a sample without label file is 255 everywhere.
        table: (256,) uint8: the value in a label file -> class, 255 (ignored) or `INVALID`.
        augment, plain: see `SegmentationDataset`.

    Raises:
        DataError: when a sample is read, for a file that is missing or cannot be decoded, an image and a label of different
            sizes, or a label value that is `INVALID`; it names the file.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        table: np.ndarray,
        augment: TrainTransform | None = None,
        plain: EvalTransform | None = None,
    ) -> None:
        super().__init__(augment, plain)
        self.pairs, self.table = list(pairs), table

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        pair = self.pairs[index]
        image = decode_image(pair.image)
        if pair.label is None:
            return image, np.full(image.shape[:2], IGNORE, np.uint8), pair.name
        stored = decode_label(pair.label)
        if stored.shape != image.shape[:2]:
            sizes = " and ".join(f"{h}x{w}" for h, w in (image.shape[:2], stored.shape))
            raise DataError(f"{pair.image} and {pair.label} must have one size, got {sizes} (height x width)")
        label = cv2.LUT(stored, self.table)
        wrong = label == INVALID
        if wrong.any():
            allowed = describe_values(np.flatnonzero(self.table != INVALID))
            value = int(stored[wrong][0])
            raise DataError(f"{pair.label}: label value {value} is out of range; allowed are {allowed}")
        return image, label, pair.name


def label_table(classes: Sequence[int], ignored: Sequence[int]) -> np.ndarray:
    """A table for `PairDataset`: value `classes[k]` becomes class k, the `ignored` values and 255 become 255."""
    table = np.full(256, INVALID, np.uint8)
    table[[*ignored, IGNORE]] = IGNORE
    table[list(classes)] = np.arange(len(classes))
    return table


def describe_values(values: Sequence[int]) -> str:
    """Sorted integers as runs: [0, 1, 2, 5] -> "0 to 2, 5"."""
    runs = np.split(np.asarray(values), np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def pair_by_name(images: Path, labels: Path) -> Found:
    """Pairs the files of two folders that have one name but for the suffix, in the order of the names.

    Raises:
        DataError: a missing or empty folder.
    """
    image_files, label_files = files_by_stem(images), files_by_stem(labels)
    found = Found([], [])
    for stem in sorted(image_files.keys() | label_files.keys()):
        if stem not in label_files:
            found.problems.append(f"{image_files[stem]} has no label: {labels / stem}.png is missing")
        elif stem not in image_files:
            found.problems.append(f"{label_files[stem]} has no image of the same name in {images}")
        else:
            found.pairs.append(Pair(image_files[stem], label_files[stem], image_files[stem].name))
    return found
