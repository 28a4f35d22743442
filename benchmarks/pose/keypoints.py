"""COCO's 17 keypoints: names, mirror pairs, limbs, and how precisely people place each."""

from __future__ import annotations

import numpy as np

NAMES = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)
COUNT = len(NAMES)
FLIP_PAIRS = tuple((left, left + 1) for left in range(1, COUNT, 2))
MIRRORED = [
    0,
    *(joint for left, right in FLIP_PAIRS for joint in (right, left)),
]  # the joint that a flip puts in each place
UPPER_BODY = tuple(range(11))  # head, shoulders and arms, for half-body augmentation
_LEGS = ((15, 13), (13, 11), (16, 14), (14, 12), (11, 12))
_TRUNK_AND_ARMS = ((5, 11), (6, 12), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10))
_HEAD = ((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6))
LIMBS = (*_LEGS, *_TRUNK_AND_ARMS, *_HEAD)
# Standard deviation of annotations, relative to the root of the person's area, as COCOeval has them
_HALF = (0.026, 0.025, 0.035, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089)  # nose, then each pair
SIGMAS = np.array([_HALF[0], *np.repeat(_HALF[1:], 2)])
