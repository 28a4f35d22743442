"""What a training run leaves in its folder: metrics.json, curves.png and predictions.png."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from .datamodules import SegmentationData
from .metrics import constant_prediction
from .pictures import save_curves, save_predictions
from .task import SegmentationTask


class RunReport(Callback):
    """Prints a line per evaluation and keeps `metrics.json`, `curves.png` and `predictions.png` in a folder up to date."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.losses: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        self.seconds = 0.0
        self._pending: list[Tensor] = []
        self._since = 0  # of `losses`, from here on they belong to the next evaluation
        self._clock = 0.0

    def state_dict(self) -> dict[str, Any]:
        self._catch_up()
        names = ("losses", "evaluations", "seconds", "_since")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    def _catch_up(self) -> None:
        if self._pending:
            now = time.perf_counter()
            self.seconds, self._clock = self.seconds + now - self._clock, now
            self.losses += torch.stack(self._pending).tolist()
            self._pending.clear()

    def on_train_start(self, trainer: Trainer, pl_module: SegmentationTask) -> None:
        self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: SegmentationTask, outputs: dict[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        self._pending.append(outputs["loss"].detach())  # read later: reading now would make a GPU wait

    def on_validation_end(self, trainer: Trainer, pl_module: SegmentationTask) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._catch_up()
        recent, self._since = self.losses[self._since :], len(self.losses)
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        evaluation = {"step": trainer.global_step, "train/loss": float(np.mean(recent)), **figures}
        self.evaluations.append(evaluation)
        pl_module.print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  step {trainer.global_step}  "
            f"loss {evaluation['train/loss']:.3f}  mIoU {figures['val/mIoU_ss']:.3f}  "
            f"pixel accuracy {figures['val/pixel_acc_ss']:.3f}  {self.seconds:.0f} s"
        )
        if trainer.is_global_zero:
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: SegmentationTask) -> None:
        if trainer.is_global_zero:
            data: SegmentationData = trainer.datamodule
            save_predictions(self.folder / "predictions.png", pl_module, data.val_set, data.palette)

    def _write(self, trainer: Trainer, pl_module: SegmentationTask) -> None:
        data: SegmentationData = trainer.datamodule
        result = pl_module.results["ss"]
        iou = {
            name: None if math.isnan(value) else value for name, value in zip(data.class_names, result.iou, strict=True)
        }
        self.baseline = constant_prediction(result.confusion)
        report = {
            "final": self.evaluations[-1],
            "best": max(self.evaluations, key=lambda evaluation: evaluation["val/mIoU_ss"]),
            "class_iou": iou,
            "constant_prediction": {**self.baseline, "class": data.class_names[self.baseline["class"]]},
            "train_seconds": self.seconds,
            "train_images": len(data.train_set),
            "val_images": len(data.val_set),
            "task": {name: value for name, value in pl_module.hparams.items() if not name.startswith("_")},
            "torch": torch.__version__,
            "device": str(pl_module.device),
            "evaluations": self.evaluations,
            "losses": self.losses,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        save_curves(self.folder / "curves.png", self.losses, self.evaluations, self.baseline["mIoU"])
