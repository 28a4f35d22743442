"""Semantic segmentation: data sets in their public layouts, embedded scenes, and the Lightning task that trains on them."""

from .camvid import CamVidData
from .cityscapes import CityscapesData
from .datamodules import ScenesData, SegmentationData
from .datasets import DataError, PairDataset, ScenesDataset
from .lip import LIPData
from .pascal_context import PascalContextData
from .protocol import Protocol
from .scenes import make_scene
from .task import SegmentationTask

__all__ = [
    "CamVidData",
    "CityscapesData",
    "DataError",
    "LIPData",
    "PairDataset",
    "PascalContextData",
    "Protocol",
    "ScenesData",
    "ScenesDataset",
    "SegmentationData",
    "SegmentationTask",
    "make_scene",
]
