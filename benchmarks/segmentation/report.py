"""What a run of a `SegmentationTask` leaves in its folder: metrics.json, curves.png and predictions.png."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from ..training import TrainingTask
from ..training.report import RunReport, save_curves
from .datamodules import SegmentationData
from .metrics import constant_prediction
from .pictures import save_predictions


class SegmentationReport(RunReport):
    """A `RunReport` with the classes' IoU, the best constant prediction, and `predictions.png` at the end of the run."""

    def describe(self, figures: dict[str, float]) -> str:
        return f"mIoU {figures['val/mIoU_ss']:.3f}  pixel accuracy {figures['val/pixel_acc_ss']:.3f}"

    def record(self, trainer: Trainer, task: TrainingTask) -> dict[str, Any]:
        data: SegmentationData = trainer.datamodule
        result = task.results["ss"]
        iou = {
            name: None if math.isnan(value) else value for name, value in zip(data.class_names, result.iou, strict=True)
        }
        self.baseline = constant_prediction(result.confusion)
        constant = {**self.baseline, "class": data.class_names[self.baseline["class"]]}
        return {"class_iou": iou, "constant_prediction": constant}

    def draw_curves(self, file: Path) -> None:
        save_curves(
            file, self.losses, self.evaluations, "val/mIoU_ss", "validation mIoU", baseline=self.baseline["mIoU"]
        )

    def on_fit_end(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        if trainer.is_global_zero:
            data: SegmentationData = trainer.datamodule
            save_predictions(self.folder / "predictions.png", pl_module, data.val_set, data.palette)
