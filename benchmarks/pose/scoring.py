"""From found poses to COCO's figures: rescoring, suppression of duplicates, result files, average precision."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UsageError
from .annotations import PERSON, Annotations
from .keypoints import NAMES, SIGMAS

EVALUATORS = {"faster-coco-eval": "faster_coco_eval", "pycocotools": "pycocotools"}  # the first is taken
FIGURES = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")  # in COCOeval's order


@dataclass(frozen=True)
class Pose:
    """A pose that was found.

    Attributes:
        index: of the person in the data set.
        image_id: COCO's.
        points: (17, 2) float64, x and y in pixels of the image.
        joint_scores: (17,) float64, the heatmaps' maxima.
        box: (left, top, width, height) that it was found in.
        area: of the region that the network saw, the measure of distances in `suppress_duplicates`, as in HRNet's code.
        score: see `rescore`.
    """

    index: int
    image_id: int
    points: np.ndarray
    joint_scores: np.ndarray
    box: tuple[float, float, float, float]
    area: float
    score: float

    def coco(self) -> dict[str, Any]:
        """The entry of a result file for COCO's server."""
        keypoints = np.column_stack([self.points, self.joint_scores]).ravel()
        return {
            "image_id": self.image_id,
            "category_id": PERSON,
            "keypoints": [round(float(value), 3) for value in keypoints],
            "score": float(self.score),
        }


def rescore(box_score: float, joint_scores: np.ndarray, threshold: float) -> float:
    """The box's score times the mean of the joint scores over `threshold`; 0 where there are none."""
    counted = joint_scores[joint_scores > threshold]
    return float(box_score * counted.mean()) if len(counted) else 0.0


def oks(points: np.ndarray, area: float, others: np.ndarray, other_areas: np.ndarray) -> np.ndarray:
    """Object keypoint similarity of a pose (17, 2) to others (n, 17, 2) -> (n,), over all joints and the mean of both areas."""
    squares = ((others - points) ** 2).sum(-1)
    areas = (area + other_areas)[:, None] / 2
    return np.exp(-squares / (2 * (2 * SIGMAS) ** 2 * (areas + np.spacing(1)))).mean(-1)


def suppress_duplicates(poses: Sequence[Pose], threshold: float) -> list[Pose]:
    """OKS-NMS: in the order of the scores, drop every pose of an image that is closer than `threshold` to one kept before."""
    by_image = defaultdict(list)
    for pose in poses:
        by_image[pose.image_id].append(pose)
    kept = []
    for rivals in by_image.values():
        rivals.sort(key=lambda pose: -pose.score)
        points, areas = np.array([p.points for p in rivals]), np.array([p.area for p in rivals])
        alive = np.ones(len(rivals), bool)
        for position, pose in enumerate(rivals):
            if alive[position]:
                kept.append(pose)
                after = slice(position + 1, None)
                alive[after] &= oks(pose.points, pose.area, points[after], areas[after]) <= threshold
    return kept


def evaluator_name() -> str:
    """Which implementation of COCOeval measures here.

    Raises:
        UsageError: none is installed.
    """
    for name, module in EVALUATORS.items():
        if importlib.util.find_spec(module):
            return name
    raise UsageError("COCO's figures need pycocotools or faster-coco-eval: pip install 'gsto_ops[train]'")


def evaluate(annotations: Annotations, poses: Sequence[Pose], implementation: str | None = None) -> dict[str, float]:
    """COCO's keypoint figures, all images of the annotation file counting.

    Args:
        annotations: the truth.
        poses: what was found.
        implementation: "pycocotools" or "faster-coco-eval"; None: the latter where it is installed. Both count alike.

    Returns:
        `FIGURES` -> value in [0, 1]. A figure without any person to measure it by, such as APL without large persons, is left
        out.
    """
    if (implementation or evaluator_name()) == "faster-coco-eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    results = [pose.coco() for pose in poses]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": picture.id} for picture in annotations.pictures.values()],
            "annotations": [
                {**record, "keypoints": record["keypoints"].ravel().tolist()} for record in annotations.records
            ],
            "categories": [{"id": PERSON, "name": "person", "keypoints": list(NAMES)}],
        }
        truth.createIndex()
        if not results:
            counted = any(record["num_keypoints"] and not record["iscrowd"] for record in annotations.records)
            return dict.fromkeys(FIGURES, 0.0) if counted else {}
        evaluation = COCOeval(truth, truth.loadRes(results), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = dict(zip(FIGURES, map(float, evaluation.stats[: len(FIGURES)]), strict=True))
    return {name: value for name, value in values.items() if value >= 0}
