"""What `gsto validate`, `gsto test` and `gsto predict` leave of a `SegmentationTask`: figures, tables, label files, pictures."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table

from ..images import write_png
from ..training import TrainingTask
from .datamodules import SegmentationData
from .datasets import SegmentationDataset
from .evaluation import Predictions, Result
from .pictures import comparison, save_confusion, spread

_OVERLAYS = 8  # unless told otherwise


class EvaluationReport(Callback):
    """Prints a table of the classes and fills a folder: `metrics.json`, `classes.md`, `confusion_<protocol>.png` and `overlays/`.

    Of a test set or a folder of images it writes a label PNG for every image into `labels/`, in the data set's own values and
    names: what a benchmark's server takes.

    With several protocols, label files and overlays show the last one's predictions. Nothing is kept from image to image.

    Args:
        folder: of the results.
        overlays: how many images to show with truth and prediction; None: 8, and all of `gsto predict`.
    """

    def __init__(self, folder: Path, overlays: int | None = None) -> None:
        self.folder, self.overlays = folder, overlays

    def setup(self, trainer: Trainer, pl_module: TrainingTask, stage: str) -> None:
        data: SegmentationData = trainer.datamodule
        sets = {"validate": "val_set", "test": "test_set", "predict": "predict_set"}
        self.dataset: SegmentationDataset = getattr(data, sets[stage])
        count = self.overlays
        if count is None:
            count = len(self.dataset) if stage == "predict" else _OVERLAYS
        self.shown = set(spread(count, self.dataset) if count else [])
        self.label_values = np.array([*data.label_values], np.uint8)
        self.next = trainer.global_rank  # the index of this process' next image

    def _write_images(self, trainer: Trainer, predictions: Predictions, batch: Any) -> None:
        data: SegmentationData = trainer.datamodule
        maps = list(predictions.values())[-1]
        for prediction, name in zip(maps, batch[-1], strict=True):
            index, self.next = self.next, self.next + trainer.world_size
            classes = prediction.cpu().numpy()
            file = data.prediction_name(name)
            if trainer.state.fn != TrainerFn.VALIDATING:
                write_png(self.folder / "labels" / file, self.label_values[classes])
            if index in self.shown:
                image, label, _ = self.dataset.read(index)
                if label.shape == classes.shape:
                    write_png(self.folder / "overlays" / file, comparison(image, label, classes, data.palette))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: TrainingTask, outputs: Predictions, batch: Any, *place: int
    ) -> None:
        self._write_images(trainer, outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: TrainingTask, outputs: Predictions, batch: Any, *place: int
    ) -> None:
        self._write_images(trainer, outputs, batch)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: TrainingTask, outputs: Predictions, batch: Any, *place: int
    ) -> None:
        self._write_images(trainer, outputs, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        self._write_figures(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        self._write_figures(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        pl_module.print(f"{len(self.dataset)} predictions: {self.folder / 'labels'}, {self.folder / 'overlays'}")

    def _write_figures(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        if not trainer.is_global_zero:
            return
        data: SegmentationData = trainer.datamodule
        results = {name: result for name, result in pl_module.results.items() if result.confusion.any()}
        if results:
            self.folder.mkdir(parents=True, exist_ok=True)
            columns = class_columns(results)
            (self.folder / "metrics.json").write_text(
                json.dumps(self._record(trainer, pl_module, results, columns), indent=1) + "\n", encoding="utf-8"
            )
            (self.folder / "classes.md").write_text(_markdown(data.class_names, columns), encoding="utf-8")
            for name, result in results.items():
                save_confusion(self.folder / f"confusion_{name}.png", result.confusion, data.class_names)
            _print_table(data.class_names, columns)
        else:
            print("No labels: nothing to measure.")
        print(f"Results in {self.folder}: {' '.join(sorted(entry.name for entry in self.folder.iterdir()))}")

    def _record(
        self, trainer: Trainer, pl_module: TrainingTask, results: dict[str, Result], columns: dict[str, list[float]]
    ) -> dict[str, Any]:
        names = trainer.datamodule.class_names
        return {
            "figures": {key: value for result in results.values() for key, value in result.figures.items()},
            "classes": {
                name: {key: None if math.isnan(values[index]) else values[index] for key, values in columns.items()}
                for index, name in enumerate(names)
            },
            "protocols": {name: asdict(pl_module.evaluator.protocols[name]) for name in results},
            "images": len(self.dataset),
            "checkpoint": trainer.ckpt_path,
        }


def class_columns(results: dict[str, Result]) -> dict[str, list[float]]:
    """The figures of every class: title with the protocol's name -> values in the order of the classes."""
    columns = {}
    for name, result in results.items():
        columns[f"IoU_{name}"] = result.iou
        columns[f"acc_{name}"] = result.accuracy
        if result.instance_iou is not None:
            columns[f"iIoU_{name}"] = result.instance_iou
    return columns


def _cells(columns: dict[str, list[float]], index: int) -> list[str]:
    return ["-" if math.isnan(values[index]) else f"{100 * values[index]:.2f}" for values in columns.values()]


def _markdown(names: tuple[str, ...], columns: dict[str, list[float]]) -> str:
    lines = [["class, in percent", *columns], ["---", *("---:" for _ in columns)]]
    lines += [[name, *_cells(columns, index)] for index, name in enumerate(names)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _print_table(names: tuple[str, ...], columns: dict[str, list[float]]) -> None:
    table = Table("class, in percent")
    for title in columns:
        table.add_column(title, justify="right")
    for index, name in enumerate(names):
        table.add_row(name, *_cells(columns, index))
    Console().print(table)
