"""Semantic segmentation: embedded scenes, CamVid, and the Lightning task that trains on them."""

from .datamodules import CamVidData, ScenesData, SegmentationData
from .datasets import DataError, FolderDataset, ScenesDataset
from .scenes import make_scene
from .task import SegmentationTask

__all__ = [
    "CamVidData",
    "DataError",
    "FolderDataset",
    "ScenesData",
    "ScenesDataset",
    "SegmentationData",
    "SegmentationTask",
    "make_scene",
]
