"""Pictures of a run: its curves, its predictions and its gates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from torch import Tensor

import gsto_models

from .datasets import SegmentationDataset
from .task import SegmentationTask
from .transforms import IGNORE, normalize

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_LINE = {"color": "tab:blue", "linewidth": 2}


def colorize(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Label (H, W) -> (H, W, 3) uint8 RGB; ignored pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[IGNORE] = 0
    return table[label]


def sample_batch(task: SegmentationTask, dataset: SegmentationDataset, index: int) -> Tensor:
    """One sample of a data set as a batch of one normalised image (1, 3, H, W) on the task's device."""
    return normalize(dataset[index][0][None].to(task.device))


def spread(count: int, dataset: SegmentationDataset) -> list[int]:
    """Up to `count` indices of a data set, evenly spaced."""
    return np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)).tolist()


@torch.inference_mode()
def save_predictions(
    file: Path, task: SegmentationTask, dataset: SegmentationDataset, palette: Sequence, count: int = 6
) -> None:
    """Rows of image | truth | prediction, the latter two laid over the image; pixels without truth stay plain."""
    task.eval()
    rows = []
    for index in spread(count, dataset):
        image, label, _ = dataset.read(index)
        prediction = task.predict_labels(sample_batch(task, dataset, index), label.shape)[0].cpu().numpy()
        row = [image]
        for classes in (label, prediction.astype(np.uint8)):
            overlay = (0.35 * image + 0.65 * colorize(classes, palette)).astype(np.uint8)
            row.append(np.where((label == IGNORE)[..., None], image, overlay))
        zoom = max(1, 400 // image.shape[1])  # small scenes are enlarged
        rows.append(np.hstack(row).repeat(zoom, 0).repeat(zoom, 1))
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    _write_png(file, np.vstack(rows))


def save_curves(file: Path, losses: Sequence[float], evaluations: Sequence[dict[str, float]], baseline: float) -> None:
    """Training loss per step (with its running mean) beside the validation mIoU; `baseline` is a constant prediction."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    left.plot(losses, color="0.8", linewidth=0.8, label="each step")
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    left.plot(np.arange(len(smooth)) + window - 1, smooth, **_LINE, label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel="training loss", ylim=(0, 1.05 * max(smooth)))
    left.legend()
    right.plot([e["step"] for e in evaluations], [e["val/mIoU_ss"] for e in evaluations], marker="o", **_LINE)
    right.axhline(baseline, color="tab:red", linestyle="--", label="best constant prediction")
    right.set(xlabel="step", ylabel="validation mIoU", ylim=(0, 1))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


@torch.inference_mode()
def save_gates(
    file: Path, task: SegmentationTask, dataset: SegmentationDataset, names: dict[str, str], count: int = 3
) -> None:
    """Rows of an image beside gates: columns by `names` = {gate's name in the network: title}.

    Gates of one column share a colour scale, which is printed above it: darkest and brightest value.
    """
    task.eval()
    indices = spread(count, dataset)
    rows = []
    for index in indices:
        with gsto_models.record_gates(task.network) as gates:
            task(sample_batch(task, dataset, index))
        rows.append([gates[name][0, 0].float().cpu().numpy() for name in names])
    height, width = dataset.read(0)[1].shape
    shape = (len(indices), len(names) + 1)
    figure, axes = plt.subplots(
        *shape, figsize=(2.1 * shape[1], 0.6 + 2.1 * height / width * shape[0]), squeeze=False, layout="constrained"
    )
    for row, index in enumerate(indices):
        axes[row, 0].imshow(dataset.read(index)[0])
        for column in range(len(names)):
            values = np.concatenate([gates[column].ravel() for gates in rows])
            low, high = np.percentile(values, [1, 99])
            panel = axes[row, column + 1]
            panel.imshow(rows[row][column], cmap="viridis", vmin=low, vmax=max(high, low + 1e-6))
            if row == 0:
                panel.set_title(f"{list(names.values())[column]}\n{low:.3f} to {high:.3f}", fontsize=8)
    axes[0, 0].set_title("image", fontsize=8)
    for panel in axes.ravel():
        panel.set_axis_off()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _write_png(file: Path, pixels: np.ndarray) -> None:
    encoded = cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))[1]
    encoded.tofile(file)
