"""The progress bar."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

_SECONDS_PER_UPDATE = 0.5


class Progress(RichProgressBar):
    """Lightning's rich bar of an epoch, with images per second over all processes and the time left for the whole run.

    The loss is read at most twice a second: reading it in every step, as Lightning's own bar does, makes a GPU wait.
    The pace is a moving average over the last steps, evaluations included in the time left as far as they happened.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._begin = self._before = self._shown = time.monotonic()
        self._first_step = trainer.global_step
        self._images = 0
        self._pace = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[0]) * trainer.world_size
        now = time.monotonic()
        if now - self._shown >= _SECONDS_PER_UPDATE or trainer.is_last_batch:
            pace = self._images / max(now - self._before, 1e-9)
            self._pace = pace if self._pace == 0 else 0.7 * self._pace + 0.3 * pace
            self._shown = self._before = now
            self._images = 0
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._before = time.monotonic()  # the pace is that of training

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if trainer.training and self._pace:
            metrics["images/s"] = f"{self._pace:.1f}"
            metrics["left"] = self._time_left(trainer)
        return metrics

    def _time_left(self, trainer: Trainer) -> str:
        done = trainer.global_step - self._first_step
        remaining = trainer.estimated_stepping_batches - trainer.global_step
        if done == 0 or remaining == float("inf"):
            return "?"
        return str(timedelta(seconds=round((time.monotonic() - self._begin) / done * remaining)))
