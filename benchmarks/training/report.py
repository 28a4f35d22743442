"""What a training run of any task leaves in its folder: metrics.json, curves.png and what the task adds."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from .task import TrainingTask

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_LINE = {"color": "tab:blue", "linewidth": 2}


class RunReport(Callback, ABC):
    """Prints a line per evaluation and keeps `metrics.json` and `curves.png` in a folder up to date.

    Args:
        folder: of the run.

    Attributes:
        losses: of every step.
        evaluations: the step, the mean loss since the last evaluation and the `val/` metrics of every evaluation.
        seconds: spent on training, evaluations included.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.losses: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        self.seconds = 0.0
        self._pending: list[Tensor] = []
        self._since = 0  # of `losses`, from here on they belong to the next evaluation
        self._clock = 0.0

    @abstractmethod
    def describe(self, figures: dict[str, float]) -> str:
        """The figures (`val/...`) of an evaluation that its line shows."""

    @abstractmethod
    def record(self, trainer: Trainer, task: TrainingTask) -> dict[str, Any]:
        """What `metrics.json` says beside what every task has."""

    @abstractmethod
    def draw_curves(self, file: Path) -> None:
        """Write `curves.png`; see `save_curves`."""

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

    def on_train_start(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: TrainingTask, outputs: dict[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        self._pending.append(outputs["loss"].detach())  # read later: reading now would make a GPU wait

    def on_validation_end(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._catch_up()
        recent, self._since = self.losses[self._since :], len(self.losses)
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        evaluation = {"step": trainer.global_step, "train/loss": float(np.mean(recent)), **figures}
        self.evaluations.append(evaluation)
        pl_module.print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  step {trainer.global_step}  "
            f"loss {evaluation['train/loss']:.3g}  {self.describe(figures)}  {self.seconds:.0f} s"
        )
        if trainer.is_global_zero:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, task: TrainingTask) -> None:
        report = {
            "final": self.evaluations[-1],
            "best": max(self.evaluations, key=lambda evaluation: evaluation[task.headline]),
            **self.record(trainer, task),
            "train_seconds": self.seconds,
            "train_images": len(trainer.datamodule.train_set),
            "val_images": len(trainer.datamodule.val_set),
            "task": {name: value for name, value in task.hparams.items() if not name.startswith("_")},
            "torch": torch.__version__,
            "device": str(task.device),
            "evaluations": self.evaluations,
            "losses": self.losses,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        self.draw_curves(self.folder / "curves.png")


def save_curves(
    file: Path,
    losses: Sequence[float],
    evaluations: Sequence[dict[str, float]],
    metric: str,
    label: str,
    baseline: float | None = None,
) -> None:
    """Training loss per step (with its running mean) beside a metric, called `label`; `baseline` is a constant prediction's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    left.plot(losses, color="0.8", linewidth=0.8, label="each step")
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    left.plot(np.arange(len(smooth)) + window - 1, smooth, **_LINE, label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel="training loss", ylim=(0, 1.05 * max(smooth)))
    left.legend()
    right.plot([e["step"] for e in evaluations], [e[metric] for e in evaluations], marker="o", **_LINE)
    right.set(xlabel="step", ylabel=label, ylim=(0, 1))
    if baseline is not None:
        right.axhline(baseline, color="tab:red", linestyle="--", label="best constant prediction")
        right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
