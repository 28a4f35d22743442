"""Grids of small pictures with titles: images, heat maps, gates and class maps."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

_WIDTH = 220  # pixels of a panel
_MARGIN = 6
_TITLE = 18
_GREY = 245


@dataclass(frozen=True)
class Panel:
    """One picture: an RGB image (H, W, 3) uint8, or a map (H, W) and how to colour it.

    "heat" spans the map's own range, "gate" too and prints that range, "classes" gives every class number its colour.
    """

    title: str
    values: np.ndarray
    kind: Literal["image", "heat", "gate", "classes"] = "image"


def class_colors(count: int) -> np.ndarray:
    """`count` colours (count, 3) uint8, neighbours far apart."""
    hues = [(0.618034 * k % 1, 0.55 + 0.35 * (k % 2), 0.95 - 0.25 * (k // 2 % 2)) for k in range(count)]
    return np.array([[round(255 * v) for v in colorsys.hsv_to_rgb(*hue)] for hue in hues], np.uint8)


def save_montage(file: Path, blocks: Sequence[tuple[str, list[list[Panel]]]], shape: tuple[int, int]) -> Path:
    """Write blocks of panels side by side, each under its title.

    Args:
        file: PNG file.
        blocks: (title, rows of panels); rows may differ in length.
        shape: (height, width) of the image; every panel gets its aspect ratio.
    """
    height = max(8, round(_WIDTH * shape[0] / shape[1]))
    drawn = [_block(title, rows, height) for title, rows in blocks]
    tallest = max(block.shape[0] for block in drawn)
    columns = []
    for block in drawn:
        bottom = tallest - block.shape[0]
        columns.append(np.pad(block, ((0, bottom), (0, 4 * _MARGIN), (0, 0)), constant_values=_GREY))
    cv2.imencode(".png", np.ascontiguousarray(np.hstack(columns)[..., ::-1]))[1].tofile(file)
    return file


def _block(title: str, rows: list[list[Panel]], height: int) -> np.ndarray:
    step_y, step_x = height + _TITLE + _MARGIN, _WIDTH + _MARGIN
    canvas = np.full((2 * _TITLE + step_y * len(rows), _MARGIN + step_x * max(map(len, rows)), 3), _GREY, np.uint8)
    _write(canvas, title, _MARGIN, 20, 0.55)
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            y, x = 2 * _TITLE + i * step_y, _MARGIN + j * step_x
            picture, text = _draw(panel)
            smooth = cv2.INTER_LINEAR if panel.kind == "image" else cv2.INTER_NEAREST
            picture = cv2.resize(picture, (_WIDTH, height), interpolation=smooth)
            canvas[y + _TITLE : y + _TITLE + height, x : x + _WIDTH] = picture
            _write(canvas, text, x, y + 13, 0.36)
    return canvas


def _draw(panel: Panel) -> tuple[np.ndarray, str]:
    if panel.kind == "image":
        return panel.values, panel.title
    if panel.kind == "classes":
        return class_colors(256)[panel.values.astype(np.uint8)], panel.title
    values = panel.values.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    scaled = (255 * (values - low) / max(high - low, 1e-12)).astype(np.uint8)
    colors = cv2.COLORMAP_VIRIDIS if panel.kind == "gate" else cv2.COLORMAP_JET
    text = f"{panel.title}  {low:.2f}-{high:.2f}" if panel.kind == "gate" else panel.title
    return cv2.applyColorMap(scaled, colors)[..., ::-1], text


def _write(canvas: np.ndarray, text: str, x: int, y: int, size: float) -> None:
    cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, (30, 30, 30), 1, cv2.LINE_AA)
