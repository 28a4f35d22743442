"""Lightning data modules: the embedded scenes and CamVid."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from . import scenes
from .datasets import DataError, FolderDataset, ScenesDataset, SegmentationDataset
from .transforms import EvalTransform, TrainTransform


class SegmentationData(LightningDataModule, ABC):
    """A training and a validation set with the classes' names and colours.

    Args:
        batch_size: training images per process and step.
        val_batch_size: validation images per step; images of one batch must have one size.
        num_workers: data loading processes; None chooses by the machine, 0 loads in the main process.

    Raises:
        ValueError: a batch size under 1, or a negative `num_workers`.
    """

    num_classes: int
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    train_set: SegmentationDataset
    val_set: SegmentationDataset

    def __init__(self, batch_size: int, val_batch_size: int, num_workers: int | None) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers must be >= 0 or None, got {num_workers}")
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers

    @abstractmethod
    def make_train_set(self) -> SegmentationDataset: ...

    @abstractmethod
    def make_val_set(self) -> SegmentationDataset: ...

    def setup(self, stage: str) -> None:
        """Open and check the data sets: bad data stops here, before the first step, in every process alike."""
        if stage == "fit":
            self.train_set = self.make_train_set()
            if len(self.train_set) < self.batch_size:
                raise DataError(
                    f"batch_size {self.batch_size} is larger than the training set ({len(self.train_set)} images), "
                    "and incomplete batches are dropped"
                )
        self.val_set = self.make_val_set()

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_set, self.val_batch_size)

    def _loader(self, dataset: SegmentationDataset, batch_size: int, **options: bool) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )


class ScenesData(SegmentationData):
    """Embedded street scenes, painted in memory: nothing is read or downloaded.

    Args:
        size: (height, width) of the scenes.
        train_scenes: number of training scenes.
        val_scenes: number of held-out scenes, from another series than the training scenes.
        seed: series of the scenes.
        batch_size, val_batch_size, num_workers: see `SegmentationData`.
    """

    num_classes = len(scenes.CLASSES)
    class_names = scenes.CLASSES
    palette = scenes.PALETTE

    def __init__(
        self,
        size: tuple[int, int] = (96, 192),
        train_scenes: int = 800,
        val_scenes: int = 100,
        seed: int = 0,
        batch_size: int = 8,
        val_batch_size: int = 8,
        num_workers: int | None = 0,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers)
        for name, value in (("train_scenes", train_scenes), ("val_scenes", val_scenes)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.size, self.train_scenes, self.val_scenes, self.seed = size, train_scenes, val_scenes, seed

    def make_train_set(self) -> ScenesDataset:
        return ScenesDataset(0, self.train_scenes, 2 * self.seed, self.size, TrainTransform(crop_size=None))

    def make_val_set(self) -> ScenesDataset:
        return ScenesDataset(0, self.val_scenes, 2 * self.seed + 1, self.size, EvalTransform())


class CamVidData(SegmentationData):
    """CamVid in its usual 11-class form: `train/ trainannot/ val/ valannot/` with label 11 = void.

    Args:
        root: folder that holds the four folders.
        crop_size: (height, width) of the training crops.
        base_size: long side of the images at scale 1.
        scale_steps: K of the training scale 0.5 + randint(0, K) / 10.
        batch_size, val_batch_size, num_workers: see `SegmentationData`. Validation reads whole images.

    Raises:
        DataError: in `setup`, for a missing folder, an unpaired or unreadable file, unequal sizes or a label value out of
            range; it names the file.
    """

    num_classes = 11
    class_names = (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    )
    palette = (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    )

    def __init__(
        self,
        root: str,
        crop_size: tuple[int, int] = (360, 480),
        base_size: int = 480,
        scale_steps: int = 16,
        batch_size: int = 8,
        val_batch_size: int = 1,
        num_workers: int | None = None,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers)
        self.root = Path(root)
        self.train_transform = TrainTransform(crop_size, base_size, scale_steps)

    def make_train_set(self) -> FolderDataset:
        return self._split("train", self.train_transform)

    def make_val_set(self) -> FolderDataset:
        return self._split("val", EvalTransform())

    def _split(self, name: str, transform: TrainTransform | EvalTransform) -> FolderDataset:
        dataset = FolderDataset(self.root / name, self.root / f"{name}annot", self.num_classes, 11, transform)
        dataset.check()
        return dataset
