"""Skeletons drawn on images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ..images import decode_image, write_png
from .annotations import Person
from .keypoints import LIMBS, NAMES
from .scoring import Pose

_COLORS = {"left": (66, 135, 245), "right": (245, 130, 48), "middle": (60, 200, 90)}  # of the person's own sides


def draw_skeleton(image: np.ndarray, points: np.ndarray, shown: np.ndarray) -> None:
    """Draw joints and limbs into an image (H, W, 3) uint8 RGB: left side blue, right side orange, what joins them green.

    Args:
        image: changed in place.
        points: (17, 2) x and y in pixels.
        shown: (17,) bool, which joints to draw; a limb needs both of its ends.
    """
    width = max(1, round(max(image.shape) / 320))
    places = [tuple(round(8 * value) for value in point) for point in points]  # in eighths of a pixel
    for first, second in LIMBS:
        if shown[first] and shown[second]:
            sides = {NAMES[joint].split("_")[0] for joint in (first, second)} & {"left", "right"}
            color = _COLORS[sides.pop() if len(sides) == 1 else "middle"]
            cv2.line(image, places[first], places[second], color, width, cv2.LINE_AA, shift=3)
    for joint in np.flatnonzero(shown):
        cv2.circle(image, places[joint], 8 * (width + 1), (255, 255, 255), -1, cv2.LINE_AA, shift=3)
        cv2.circle(image, places[joint], 8 * width, (200, 30, 60), -1, cv2.LINE_AA, shift=3)


def draw_poses(image: np.ndarray, poses: Sequence[Pose], drawn_above: float) -> np.ndarray:
    """A copy of an image (H, W, 3) uint8 RGB with the poses and joints of a score over `drawn_above`, the best on top."""
    image = image.copy()
    for pose in sorted(poses, key=lambda pose: pose.score):
        if pose.score > drawn_above:
            draw_skeleton(image, pose.points, pose.joint_scores > drawn_above)
    return image


def draw_people(image: np.ndarray, people: Sequence[Person]) -> np.ndarray:
    """A copy of an image (H, W, 3) uint8 RGB with the annotated keypoints of persons."""
    image = image.copy()
    for person in people:
        if person.keypoints is not None:
            draw_skeleton(image, person.keypoints[:, :2], person.keypoints[:, 2] > 0)
    return image


def save_overlays(
    folder: Path,
    people: Sequence[Person],
    truth: Sequence[Person],
    poses: Sequence[Pose],
    count: int,
    drawn_above: float,
) -> None:
    """Write a PNG for up to `count` images of `people`, evenly spaced: truth | poses, or only poses where no truth is known."""
    pictures = {person.picture.id: person.picture for person in people}
    chosen = [list(pictures)[i] for i in np.unique(np.linspace(0, len(pictures) - 1, count).astype(int))]
    known, found = defaultdict(list), defaultdict(list)
    for person in truth:
        known[person.picture.id].append(person)
    for pose in poses:
        found[pose.image_id].append(pose)
    for number in chosen:
        image = decode_image(pictures[number].file)
        drawn = draw_poses(image, found[number], drawn_above)
        if known[number]:
            drawn = np.hstack([draw_people(image, known[number]), drawn])
        write_png(folder / f"{pictures[number].file.stem}.png", drawn)
