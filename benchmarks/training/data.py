"""What the Lightning data modules of all tasks share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import DataError
from ..sampling import ShardSampler, TrainLoader, run_seed


class TrainingData(LightningDataModule, ABC):
    """A training and a validation set, and loaders that share them among the processes of a run.

    The training set takes `gsto_benchmarks.sampling.Draw`, the others take indices. A batch starts with the images and ends
    with the samples' names.

    Args:
        batch_size: training images per process and step; with a global batch size, the most that a process takes at once.
        val_batch_size: evaluation images per process and step.
        num_workers: data loading processes; None chooses by the machine, 0 loads in the main process.

    Attributes:
        num_classes: output channels of the network.

    Raises:
        ValueError: a batch size under 1, or a negative `num_workers`.
        DataError: in `setup`, for a training set with fewer images than a batch.
    """

    num_classes: int
    train_set: Dataset
    val_set: Dataset

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
    def make_train_set(self) -> Dataset: ...

    @abstractmethod
    def make_val_set(self) -> Dataset: ...

    def setup(self, stage: str) -> None:
        """Open and check the data sets: bad data stops here, before the first step, in every process alike."""
        if stage == "fit":
            self.train_set = self.make_train_set()
            step = self.batch_size * self._accumulate() * self.share()["world_size"]
            if len(self.train_set) < step:
                raise DataError(
                    f"a step takes {step} images (batch_size {self.batch_size}, over all processes and accumulated batches), "
                    f"but the training set has {len(self.train_set)}, and incomplete steps are dropped"
                )
        if stage in ("fit", "validate"):
            self.val_set = self.make_val_set()

    def count_train_images(self) -> tuple[int, str]:
        """How many training images there are, and how that is known; for plans, so files need not be read."""
        return len(self.make_train_set()), "counted"

    @abstractmethod
    def example_batch(self, size: int) -> Any:
        """A training batch of `size` samples as the task sees it, contents without meaning; for plans, without any files."""

    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(
            self.train_set,
            self.batch_size,
            seed=run_seed(),
            accumulate=self._accumulate(),
            **self.share(),
            **self._options(),
        )

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_loader(self.val_set)

    def evaluation_loader(self, dataset: Dataset, collate: Callable[[list], Any] = default_collate) -> DataLoader:
        """Each sample once, in one of the processes."""
        sampler = ShardSampler(len(dataset), **self.share())
        return DataLoader(
            dataset, batch_size=self.val_batch_size, sampler=sampler, collate_fn=collate, **self._options()
        )

    def share(self) -> dict[str, int]:
        """This process among those of the run: rank and world_size."""
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _accumulate(self) -> int:
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches

    def _options(self) -> dict[str, int | bool]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
