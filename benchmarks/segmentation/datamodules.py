"""What the Lightning data modules of all segmentation data sets share, and the one of the embedded scenes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ..sampling import ShardSampler, TrainLoader, run_seed
from . import scenes
from .datasets import DataError, ScenesDataset, SegmentationDataset
from .protocol import MULTI_SCALE, Protocol, by_name

Sample = tuple[Tensor, Tensor, str]


class SegmentationData(LightningDataModule, ABC):
    """The sets of a data set, with the classes' names and colours.

    A batch is (images (N, 3, H, W) float32, labels (N, H, W) int64 with 255 = ignored, names); where the labels of an
    evaluation batch differ in size they are a list of N tensors (H', W').

    Args:
        batch_size: training images per process and step.
        val_batch_size: evaluation images per step; images of one batch must have one size.
        num_workers: data loading processes; None chooses by the machine, 0 loads in the main process.

    Attributes:
        num_classes, class_names, palette: the classes, in the order of their numbers, and their RGB colours.
        flip_pairs: classes that are each other's mirror image, such as left and right arm.
        label_values: the value of each class in the data set's own label files.
        protocols: how a network is evaluated here, by name; the first is the one used while training.

    Raises:
        ValueError: a batch size under 1, or a negative `num_workers`.
    """

    num_classes: int
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    flip_pairs: tuple[tuple[int, int], ...] = ()
    protocols: dict[str, Protocol] = by_name(Protocol(), Protocol(flip=True), Protocol(MULTI_SCALE, flip=True))
    train_set: SegmentationDataset
    val_set: SegmentationDataset
    test_set: SegmentationDataset

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

    def make_test_set(self) -> SegmentationDataset:
        """The set of `gsto test`; data sets without one raise a DataError."""
        raise DataError(f"{type(self).__name__} has no test set: use gsto validate")

    @property
    def label_values(self) -> Sequence[int]:
        return range(self.num_classes)

    def prediction_name(self, name: str) -> str:
        """Name, relative to a folder of predictions, of the label PNG predicted for the sample `name`."""
        return str(Path(name).with_suffix(".png"))

    def prepare_data(self) -> None:
        """Check all files in one process per machine; the other processes then find that they were checked."""
        if self.trainer is not None and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str) -> None:
        """Open and check the data sets: bad data stops here, before the first step, in every process alike."""
        if stage == "fit":
            self.train_set = self.make_train_set()
            if len(self.train_set) < self.batch_size:
                raise DataError(
                    f"batch_size {self.batch_size} is larger than the training set ({len(self.train_set)} images), "
                    "and incomplete batches are dropped"
                )
        if stage in ("fit", "validate"):
            self.val_set = self.make_val_set()
        if stage == "test":
            self.test_set = self.make_test_set()

    def train_dataloader(self) -> TrainLoader:
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return TrainLoader(
            self.train_set, self.batch_size, seed=run_seed(), accumulate=accumulate, **self._share(), **self._options()
        )

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.test_set)

    def _evaluation_loader(self, dataset: SegmentationDataset) -> DataLoader:
        sampler = ShardSampler(len(dataset), **self._share())
        return DataLoader(dataset, self.val_batch_size, sampler=sampler, collate_fn=collate, **self._options())

    def _share(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _options(self) -> dict[str, int | bool]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor | list[Tensor], list[str]]:
    """Samples for evaluation -> one batch; labels of several sizes stay a list.

    Raises:
        DataError: the images have several sizes.
    """
    images, labels, names = zip(*samples, strict=True)
    sizes = {tuple(image.shape[1:]): name for image, name in zip(images, names, strict=True)}
    if len(sizes) > 1:
        found = " and ".join(f"{h}x{w} ({name})" for (h, w), name in sizes.items())
        raise DataError(f"images of one batch must have one size, got {found}: set val_batch_size to 1")
    same = len({label.shape for label in labels}) == 1
    return default_collate(images), default_collate(labels) if same else list(labels), list(names)


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

    def prepare_data(self) -> None:
        """Nothing to check: the scenes are painted in every process."""

    def make_train_set(self) -> ScenesDataset:
        return ScenesDataset(0, self.train_scenes, 2 * self.seed, self.size)

    def make_val_set(self) -> ScenesDataset:
        return ScenesDataset(0, self.val_scenes, 2 * self.seed + 1, self.size)
