"""What runs of a `PoseTask` leave: curves, figures, result files and pictures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table

from ..training import TrainingTask
from ..training.report import RunReport, save_curves
from .pictures import save_overlays
from .scoring import FIGURES, evaluator_name

_OVERLAYS = 8  # unless told otherwise
_TITLES = FIGURES[:6]  # AP, AP50, AP75, APM, APL, AR: what papers report


class PoseReport(RunReport):
    """A `RunReport` with pictures of the last evaluation's poses in `overlays/`: truth beside prediction."""

    def describe(self, figures: dict[str, float]) -> str:
        shown = {
            name: value for title in ("AP", "AR") for name, value in figures.items() if name.startswith(f"val/{title}_")
        }
        return "  ".join(f"{name.removeprefix('val/')} {value:.3f}" for name, value in shown.items())

    def record(self, trainer: Trainer, task: TrainingTask) -> dict[str, Any]:
        self.headline = task.headline
        return {"evaluator": evaluator_name()}

    def draw_curves(self, file: Path) -> None:
        save_curves(file, self.losses, self.evaluations, self.headline, self.headline)

    def on_fit_end(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        if trainer.is_global_zero and pl_module.poses:
            data, options = trainer.datamodule, pl_module.evaluation
            truth = data.val_annotations.people
            count = _OVERLAYS if options.overlays is None else options.overlays
            save_overlays(
                self.folder / "overlays", data.val_set.people, truth, pl_module.poses, count, options.drawn_above
            )


class EvaluationReport(Callback):
    """Fills a folder with `keypoints.json` (what COCO's server takes), `overlays/` and, where truth is known, `metrics.json`.

    `gsto predict` leaves `poses.json`: a list of {"file_name", "bbox", "keypoints" (17 x x, y, score), "score"}.

    Args:
        folder: of the results.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        self._write_json("keypoints.json", [pose.coco() for pose in pl_module.poses])
        figures = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()}
        protocol = pl_module.evaluation.protocol(data.evaluated_boxes)
        record = {
            "figures": figures,
            "protocol": {"boxes": data.evaluated_boxes, **asdict(pl_module.evaluation)},
            "images": len(data.val_annotations.pictures),
            "boxes": len(data.val_set),
            "poses": len(pl_module.poses),
            "evaluator": evaluator_name(),
            "checkpoint": trainer.ckpt_path,
        }
        self._write_json("metrics.json", record)
        self._draw(pl_module, data.val_set.people, data.val_annotations.people, _OVERLAYS)
        table = Table(f"in percent, {protocol}", *_TITLES)
        cells = [figures.get(f"{title}_{protocol}") for title in _TITLES]
        table.add_row(f"{len(data.val_set)} boxes", *("-" if cell is None else f"{100 * cell:.1f}" for cell in cells))
        Console().print(table)
        print(f"Results in {self.folder}: {' '.join(sorted(entry.name for entry in self.folder.iterdir()))}")

    def on_test_end(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        if trainer.is_global_zero:
            self._write_json("keypoints.json", [pose.coco() for pose in pl_module.poses])
            self._draw(pl_module, trainer.datamodule.test_set.people, [], _OVERLAYS)
            print(f"{len(pl_module.poses)} poses for the server: {self.folder / 'keypoints.json'}")

    def on_predict_end(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        if not trainer.is_global_zero:
            return
        people = trainer.datamodule.predict_set.people
        entries = []
        for pose in pl_module.poses:
            found = pose.coco()
            entries.append(
                {
                    "file_name": people[pose.index].picture.file.name,
                    "bbox": list(pose.box),
                    "keypoints": found["keypoints"],
                    "score": found["score"],
                }
            )
        self._write_json("poses.json", entries)
        self._draw(pl_module, people, [], len(people))
        print(f"{len(entries)} poses: {self.folder / 'poses.json'}, {self.folder / 'overlays'}")

    def _write_json(self, name: str, content: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def _draw(self, task: TrainingTask, people: list, truth: list, usual: int) -> None:
        count = usual if task.evaluation.overlays is None else task.evaluation.overlays
        save_overlays(self.folder / "overlays", people, truth, task.poses, count, task.evaluation.drawn_above)
