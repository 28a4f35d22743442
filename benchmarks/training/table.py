"""metrics.csv: everything that a run logs, one row per step."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

_ROWS_PER_WRITE = 100


class MetricsTable(Logger):
    """Writes `metrics.csv` into a run's folder. A run that is resumed keeps the rows from before the step it goes on from.

    (Lightning's CSVLogger deletes them.)
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"
        self.rows: dict[int, dict[str, Any]] = {}
        self._earlier: dict[int, dict[str, Any]] = {}
        if self.file.is_file():
            with open(self.file, encoding="utf-8", newline="") as file:
                rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
            self._earlier = {int(row["step"]): row for row in rows}
        self._unwritten = 0

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = max(self.rows, default=0) if step is None else step
        if self._earlier:
            self.rows = {number: row for number, row in self._earlier.items() if number < step}
            self._earlier = {}
        self.rows.setdefault(step, {"step": step}).update(metrics)
        self._unwritten += 1
        if self._unwritten >= _ROWS_PER_WRITE or any(name.startswith("val/") for name in metrics):
            self.save()

    @rank_zero_only
    def save(self) -> None:
        if not self._unwritten:
            return
        names = sorted({name for row in self.rows.values() for name in row} - {"step"})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(self.file.name + ".partial")
        with open(partial, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["step", *names])
            writer.writeheader()
            writer.writerows(self.rows.values())
        os.replace(partial, self.file)
        self._unwritten = 0

    def finalize(self, status: str) -> None:
        self.save()
