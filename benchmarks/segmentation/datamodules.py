"""What the Lightning data modules of all segmentation data sets share, and the one of the embedded scenes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ..images import normalize
from ..training import TrainingData
from . import scenes
from .datasets import DataError, ScenesDataset, SegmentationDataset
from .metrics import Instances
from .protocol import MULTI_SCALE, Protocol, by_name

Sample = tuple[Tensor, Tensor, str]


class SegmentationData(TrainingData):
    """The sets of a data set, with the classes' names and colours.

    A batch as the task sees it is (images (N, 3, H, W) float32, labels (N, H, W) int64 with 255 = ignored, names); where the
    labels of an evaluation batch differ in size they are a list of N tensors (H', W'). The loaders give images (N, H, W, 3)
    and labels as uint8: `on_after_batch_transfer` makes the numbers of them, on the device.

    Args:
        batch_size, num_workers: see `TrainingData`.
        val_batch_size: evaluation images per process and step; images of one batch must have one size.

    Attributes:
        num_classes, class_names, palette: the classes, in the order of their numbers, and their RGB colours.
        flip_pairs: classes that are each other's mirror image, such as left and right arm.
        label_values: the value of each class in the data set's own label files.
        protocols: how a network is evaluated here, by name; the first is the one used while training.

    Raises:
        ValueError, DataError: see `TrainingData`.
    """

    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    flip_pairs: tuple[tuple[int, int], ...] = ()
    protocols: dict[str, Protocol] = by_name(Protocol(), Protocol(flip=True), Protocol(MULTI_SCALE, flip=True))
    train_set: SegmentationDataset
    val_set: SegmentationDataset
    test_set: SegmentationDataset
    predict_set: SegmentationDataset

    @abstractmethod
    def make_train_set(self) -> SegmentationDataset: ...

    @abstractmethod
    def make_val_set(self) -> SegmentationDataset: ...

    @property
    @abstractmethod
    def train_size(self) -> tuple[int, int]:
        """(height, width) of the training images as the network sees them."""

    def example_batch(self, size: int) -> tuple[Tensor, Tensor, list[str]]:
        images = torch.zeros(size, 3, *self.train_size).contiguous(memory_format=torch.channels_last)
        return images, torch.zeros(size, *self.train_size, dtype=torch.int64), ["example"] * size

    def make_test_set(self) -> SegmentationDataset:
        """The set of `gsto test`; data sets without one raise a DataError."""
        raise DataError(f"{type(self).__name__} has no test set: use gsto validate")

    def make_predict_set(self) -> SegmentationDataset:
        """The images of `gsto predict`; data sets that do not take any raise a DataError."""
        raise DataError(f"{type(self).__name__} does not predict images of yours: use gsto visualize")

    @property
    def label_values(self) -> Sequence[int]:
        return range(self.num_classes)

    def instances(self) -> Instances | None:
        """The instances of the validation set's samples, for iIoU; None where there are none."""
        return None

    def prediction_name(self, name: str) -> str:
        """Name, relative to a folder of predictions, of the label PNG predicted for the sample `name`."""
        return str(Path(name).with_suffix(".png"))

    def prepare_data(self) -> None:
        """Check all files in one process per machine; the other processes then find that they were checked."""
        if self.trainer is not None and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str) -> None:
        """Open and check the data sets: bad data stops here, before the first step, in every process alike."""
        super().setup(stage)
        if stage == "test":
            self.test_set = self.make_test_set()
        if stage == "predict":
            self.predict_set = self.make_predict_set()

    def on_after_batch_transfer(self, batch: tuple, dataloader_idx: int = 0) -> tuple:
        images, labels, names = batch
        labels = [label.long() for label in labels] if isinstance(labels, list) else labels.long()
        return normalize(images), labels, names

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_loader(self.val_set, collate)

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_loader(self.test_set, collate)

    def predict_dataloader(self) -> DataLoader:
        return self.evaluation_loader(self.predict_set, collate)


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor | list[Tensor], list[str]]:
    """Samples for evaluation -> one batch; labels of several sizes stay a list.

    Raises:
        DataError: the images have several sizes.
    """
    images, labels, names = zip(*samples, strict=True)
    sizes = {tuple(image.shape[:2]): name for image, name in zip(images, names, strict=True)}
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

    @property
    def train_size(self) -> tuple[int, int]:
        return self.size

    def count_train_images(self) -> tuple[int, str]:
        return self.train_scenes, "generated"

    def prepare_data(self) -> None:
        """Nothing to check: the scenes are painted in every process."""

    def make_train_set(self) -> ScenesDataset:
        return ScenesDataset(0, self.train_scenes, 2 * self.seed, self.size)

    def make_val_set(self) -> ScenesDataset:
        return ScenesDataset(0, self.val_scenes, 2 * self.seed + 1, self.size)
