"""From an image and a person on it to what the network sees, with the augmentation of the protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from .annotations import Person
from .boxes import Region, crop_matrix, region_of, transform_points
from .keypoints import MIRRORED, UPPER_BODY

_HALF_BODY_MARGIN = 1.5


@dataclass(frozen=True)
class Augmentation:
    """How training samples vary.

    Args:
        distribution: "paper": rotation and scale are uniform, and every sample is rotated. "hrnet" as in HRNet's code:
            rotation is normal with standard deviation `rotation`, clipped at twice that, in 60 % of the samples; scale is
            1 + `scale` x normal, clipped at 1 - `scale` and 1 + `scale`.
        rotation: in degrees.
        scale: of the region, relative.
        flip: probability of a mirrored sample.
        half_body: probability that a person with more than 8 labelled joints is cut to the upper or lower body (0.3 in
            HRNet's code).

    Raises:
        ValueError: a number out of range.
    """

    distribution: Literal["paper", "hrnet"] = "paper"
    rotation: float = 45.0
    scale: float = 0.35
    flip: float = 0.5
    half_body: float = 0.0

    def __post_init__(self) -> None:
        if self.distribution not in ("paper", "hrnet"):
            raise ValueError(f"augmentation.distribution must be 'paper' or 'hrnet', got {self.distribution!r}")
        for name, top in (("rotation", 180), ("scale", 0.99), ("flip", 1), ("half_body", 1)):
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(f"augmentation.{name} must be in 0 .. {top}, got {getattr(self, name)}")

    def draw(self, person: Person, aspect: float, rng: np.random.Generator) -> tuple[Region, float, bool]:
        """The region, its rotation in degrees, and whether it is mirrored."""
        region = region_of(person.box, aspect)
        if rng.random() < self.half_body:
            region = half_body(person.keypoints, aspect, rng) or region
        if self.distribution == "paper":
            scale, rotation = rng.uniform(1 - self.scale, 1 + self.scale), rng.uniform(-self.rotation, self.rotation)
        else:
            scale = np.clip(1 + self.scale * rng.standard_normal(), 1 - self.scale, 1 + self.scale)
            rotation = np.clip(self.rotation * rng.standard_normal(), -2 * self.rotation, 2 * self.rotation)
            rotation = rotation if rng.random() < 0.6 else 0.0
        return region.scaled(float(scale)), float(rotation), bool(rng.random() < self.flip)


def half_body(keypoints: np.ndarray, aspect: float, rng: np.random.Generator) -> Region | None:
    """The region of the upper or the lower body, by chance; None with 8 or fewer labelled joints, or too few on either half."""
    labelled = np.flatnonzero(keypoints[:, 2] > 0)
    if len(labelled) <= 8:
        return None
    upper = labelled[np.isin(labelled, UPPER_BODY)]
    lower = np.setdiff1d(labelled, upper)
    first, second = (upper, lower) if rng.random() < 0.5 else (lower, upper)
    joints = first if len(first) > 2 else second
    points = keypoints[joints, :2]
    low, high = points.min(0), points.max(0)
    width, height = np.maximum(high - low, 1.0)  # joints in one line have no height
    whole = region_of((low[0], low[1], width, height), aspect, _HALF_BODY_MARGIN)
    return Region(*points.mean(0).tolist(), whole.width, whole.height)


def crop(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What the network sees, (height, width, 3) uint8: bilinear, black outside the image."""
    return cv2.warpAffine(image, matrix, size[::-1], flags=cv2.INTER_LINEAR)


def place_joints(keypoints: np.ndarray, matrix: np.ndarray, flip: bool) -> np.ndarray:
    """Keypoints of the image (17, 3) -> joints of the input (17, 3) float32: x, y, and 1 where labelled (hidden or not), or 0.

    A flip puts the right joint in the left one's place.
    """
    joints = np.column_stack([transform_points(keypoints[:, :2], matrix), keypoints[:, 2] > 0])
    return (joints[MIRRORED] if flip else joints).astype(np.float32)


def train_sample(
    image: np.ndarray, person: Person, size: tuple[int, int], augmentation: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Input (height, width, 3) uint8 and joints (17, 3) float32 of an augmented sample."""
    region, rotation, flip = augmentation.draw(person, size[1] / size[0], rng)
    matrix = crop_matrix(region, size, rotation, flip)
    return crop(image, matrix, size), place_joints(person.keypoints, matrix, flip)
