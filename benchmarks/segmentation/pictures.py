"""Pictures of a `SegmentationTask`: its predictions and its gates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from torch import Tensor

import gsto_models

from ..images import normalize, write_png
from ..training import TrainingTask
from .datasets import SegmentationDataset
from .transforms import IGNORE

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def colorize(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Label (H, W) -> (H, W, 3) uint8 RGB; ignored pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[IGNORE] = 0
    return table[label]


def sample_batch(task: TrainingTask, dataset: SegmentationDataset, index: int) -> Tensor:
    """One sample of a data set as a batch of one normalised image (1, 3, H, W) on the task's device."""
    return normalize(dataset[index][0][None].to(task.device))


def spread(count: int, dataset: SegmentationDataset) -> list[int]:
    """Up to `count` indices of a data set, evenly spaced."""
    return np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)).tolist()


def overlay(image: np.ndarray, classes: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Classes (H, W) laid over an image (H, W, 3) uint8; ignored pixels stay plain."""
    mixed = cv2.addWeighted(image, 0.35, colorize(classes, palette), 0.65, 0)
    return np.where((classes == IGNORE)[..., None], image, mixed)


def comparison(image: np.ndarray, label: np.ndarray, prediction: np.ndarray, palette: Sequence) -> np.ndarray:
    """image | truth | prediction, the latter two laid over the image; without any truth image | prediction."""
    if (label == IGNORE).all():
        return np.hstack([image, overlay(image, prediction, palette)])
    prediction = np.where(label == IGNORE, np.uint8(IGNORE), prediction)
    return np.hstack([image, overlay(image, label, palette), overlay(image, prediction, palette)])


@torch.inference_mode()
def save_predictions(
    file: Path, task: TrainingTask, dataset: SegmentationDataset, palette: Sequence, count: int = 6
) -> None:
    """Rows of image | truth | prediction; see `comparison`."""
    task.eval()
    rows = []
    for index in spread(count, dataset):
        image, label, _ = dataset.read(index)
        (prediction,) = task.predict_labels(sample_batch(task, dataset, index), [label.shape])
        row = comparison(image, label, prediction.cpu().numpy().astype(np.uint8), palette)
        zoom = max(1, 400 // image.shape[1])  # small scenes are enlarged
        rows.append(row.repeat(zoom, 0).repeat(zoom, 1))
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    write_png(file, np.vstack(rows))


def save_confusion(file: Path, confusion: Tensor, names: Sequence[str]) -> None:
    """The confusion matrix (C, C): which share of every class' pixels (row) was taken for which class (column), in percent."""
    counts = confusion.double()
    shares = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = 2.2 + 0.32 * len(names)
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.argwhere(shares >= 0.5):
        value = shares[row, column]
        axes.text(
            column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color="white" if value > 60 else "black"
        )
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set(xlabel="prediction", ylabel="truth")
    figure.savefig(file, dpi=130)
    plt.close(figure)


@torch.inference_mode()
def save_gates(
    file: Path, task: TrainingTask, dataset: SegmentationDataset, names: dict[str, str], count: int = 3
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
