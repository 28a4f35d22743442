"""A task and data that train in milliseconds, for tests of the trainer itself; imported by processes of its own as well."""

import json
import os
import signal

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import Dataset

from gsto_benchmarks.sampling import Draw
from gsto_benchmarks.training import TrainingData, TrainingTask


class ToySet(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, item):
        index, seed = item if isinstance(item, Draw) else (item, 0)
        image = np.random.default_rng(index).normal(size=(3, 6, 6)) + np.random.default_rng(seed).normal(size=(3, 1, 1))
        return torch.from_numpy(image).float(), index % 2, f"sample {index}"


class ToyData(TrainingData):
    num_classes = 2

    def __init__(self, batch_size: int = 4, num_workers: int = 0, train_size: int = 26):
        super().__init__(batch_size, 2, num_workers)
        self.train_size = train_size

    def make_train_set(self):
        return ToySet(self.train_size)

    def make_val_set(self):
        return ToySet(6)

    def example_batch(self, size):
        return torch.zeros(size, 3, 6, 6), torch.zeros(size, dtype=torch.int64), ["example"] * size


class Crash(Exception):
    """Stands for anything that ends a run."""


class ToyTask(TrainingTask):
    """Ends itself in the training step after `end_at` optimizer steps, by an exception or a signal."""

    headline = "val/score"

    def __init__(
        self,
        num_classes: int,
        norm: bool = True,
        dropout: float = 0.3,
        end_at: int | None = None,
        end_by: str = "exception",
        nan_at: int | None = None,
        **training,
    ):
        super().__init__(**training)
        self.save_hyperparameters()
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(dropout)]
        self.use(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)))
        self.end_at, self.end_by, self.nan_at = end_at, end_by, nan_at

    def make_reports(self, folder):
        return [Trace(folder)]

    def training_loss(self, batch):
        images, labels, _ = batch
        if self.end_at is not None and self.global_step == self.end_at:
            if self.end_by == "exception":
                raise Crash
            os.kill(os.getpid(), signal.Signals[self.end_by])
        loss = nn.functional.cross_entropy(self(images), labels)
        return loss * float("nan") if self.global_step == self.nan_at else loss

    def validation_step(self, batch, batch_idx):
        images, labels, _ = batch
        self.log(
            "val/score", -nn.functional.cross_entropy(self(images), labels), batch_size=len(images), sync_dist=True
        )


class Trace(Callback):
    """Appends a line per training step and per evaluation to trace<rank>.jsonl."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, trainer, **values):
        with open(self.folder / f"trace{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps({"step": trainer.global_step, **values}) + "\n")

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        self.write(trainer, epoch=trainer.current_epoch, loss=outputs["loss"].item(), names=batch[2], lr=rate)

    def on_validation_epoch_end(self, trainer, task):
        self.write(trainer, score=float(trainer.callback_metrics["val/score"]))
