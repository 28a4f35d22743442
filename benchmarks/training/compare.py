"""`gsto compare`: runs side by side, as a table and as curves."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ..errors import UsageError

USUAL = "val/mIoU_ss"
Series = dict[str, list[tuple[int, float]]]  # metric -> (step, value)


def read_run(folder: Path) -> Series:
    """What a run's metrics.csv holds.

    Raises:
        UsageError: there is none, or it has no rows.
    """
    file = folder / "metrics.csv"
    if not file.is_file():
        raise UsageError(f"{file}: no such file; gsto fit writes it into a run's folder")
    series: Series = {}
    with open(file, encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            for name, value in row.items():
                if name != "step" and value:
                    series.setdefault(name, []).append((int(row["step"]) + 1, float(value)))
    if "train/loss" not in series:
        raise UsageError(f"{file}: no training loss in it yet")
    return series


def compare(folders: Sequence[Path], metric: str | None, file: Path) -> str:
    """Draw loss and metric of runs over their steps into `file`; returns a Markdown table of them.

    Args:
        metric: a column of metrics.csv; None: val/mIoU_ss, or the first evaluation that all runs have.

    Raises:
        UsageError: a run without metrics.csv, or without this metric.
    """
    runs = {str(folder): read_run(folder) for folder in folders}
    if metric is None:
        common = [name for name in next(iter(runs.values())) if all(name in series for series in runs.values())]
        evaluations = [name for name in common if name.startswith("val/")]
        metric = USUAL if USUAL in evaluations or not evaluations else evaluations[0]
    rows = [f"| run | steps | loss, last tenth | {metric}, last | {metric}, best |", "| --- | --- | --- | --- | --- |"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, series in runs.items():
        if metric not in series:
            known = ", ".join(key for key in series if key.startswith("val/")) or "none"
            raise UsageError(f"{name}: its metrics.csv has no {metric}; evaluations in it: {known}")
        steps, losses = map(np.array, zip(*series["train/loss"], strict=True))
        window = max(1, len(losses) // 20)
        left.plot(steps[window - 1 :], np.convolve(losses, np.ones(window) / window, "valid"), label=name)
        where, values = zip(*series[metric], strict=True)
        right.plot(where, values, marker="o", label=name)
        tail = losses[-max(1, len(losses) // 10) :].mean()
        rows.append(f"| {name} | {steps[-1]:,} | {tail:.3f} | {values[-1]:.3f} | {max(values):.3f} |")
    left.set(xlabel="step", ylabel="training loss, moving mean")
    right.set(xlabel="step", ylabel=metric)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return "\n".join(rows)


def run(argv: Sequence[str], description: str) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="gsto compare", description=description, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, with metrics.csv")
    parser.add_argument("--metric", help=f"default: {USUAL}, or the first evaluation that all runs have")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.png"), help="picture (default: %(default)s)")
    options = parser.parse_args(argv)
    print(compare(options.runs, options.metric, options.out))
    print(f"\nCurves: {options.out}")
