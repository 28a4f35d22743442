"""From a person's box to the part of the image that the network sees, and back."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

MARGIN = 1.25


class Region(NamedTuple):
    """A part of an image around (x, y), in pixels."""

    x: float
    y: float
    width: float
    height: float

    @property
    def area(self) -> float:
        return self.width * self.height

    def scaled(self, factor: float) -> Region:
        return Region(self.x, self.y, self.width * factor, self.height * factor)


def clip_box(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """The part of a box (left, top, width, height) that is on an image of (height, width); None where nothing is left.

    As in HRNet's code a box of width w reaches from its left pixel to left + w - 1, and w shrinks by one.
    """
    x, y, w, h = box
    left, top = max(0.0, x), max(0.0, y)
    right = min(size[1] - 1.0, x + max(0.0, w - 1))
    bottom = min(size[0] - 1.0, y + max(0.0, h - 1))
    if right <= left or bottom <= top:
        return None
    return left, top, right - left, bottom - top


def region_of(box: tuple[float, float, float, float], aspect: float, margin: float = MARGIN) -> Region:
    """The region around a box (left, top, width, height): widened to `aspect` = width / height, then grown by `margin`."""
    x, y, w, h = box
    return Region(x + w / 2, y + h / 2, max(w, h * aspect) * margin, max(h, w / aspect) * margin)


def crop_matrix(region: Region, size: tuple[int, int], rotation: float = 0.0, flip: bool = False) -> np.ndarray:
    """(2, 3) float64, from points of the image to points of the network's input.

    The region's centre goes to (width / 2, height / 2) of the input, and its width becomes the input's.

    Args:
        region: of the input's aspect.
        size: (height, width) of the input.
        rotation: of the region around its centre, in degrees, clockwise as one looks at the image.
        flip: mirror the result: x becomes width - 1 - x.
    """
    height, width = size
    scale = width / region.width
    cos, sin = (scale * value for value in (math.cos(math.radians(rotation)), math.sin(math.radians(rotation))))
    linear = np.array([[cos, sin], [-sin, cos]])
    matrix = np.column_stack([linear, np.array([width / 2, height / 2]) - linear @ np.array([region.x, region.y])])
    if flip:
        matrix[0] *= -1
        matrix[0, 2] += width - 1
    return matrix


def transform_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points (..., 2) by a (2, 3) matrix."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def to_image(points: np.ndarray, region: Region, size: tuple[int, int]) -> np.ndarray:
    """Points (..., 2) of a map of (height, width) that shows the region -> points of the image; the way back of `crop_matrix`."""
    scale = region.width / size[1]
    return (points - np.array([size[1] / 2, size[0] / 2])) * scale + np.array([region.x, region.y])
