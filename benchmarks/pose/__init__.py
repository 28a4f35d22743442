"""Pose estimation: COCO keypoints, heatmaps, and the Lightning task that trains on them."""

from .coco import CocoData, Split
from .evaluation import EvaluationOptions
from .task import PoseTask
from .transforms import Augmentation

__all__ = ["Augmentation", "CocoData", "EvaluationOptions", "PoseTask", "Split"]
