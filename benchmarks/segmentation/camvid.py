"""CamVid in its usual 11-class form."""

from __future__ import annotations

from typing import Any, ClassVar

from .datasets import Found, label_table, pair_by_name
from .folders import FolderData


class CamVidData(FolderData):
    """CamVid: `train/ trainannot/ val/ valannot/ test/ testannot/` with label 11 = void; 360x480 pixels.

    Args:
        root: folder that holds these folders.
        crop_size, base_size, scale_steps, batch_size, options: see `FolderData`.

    Raises:
        DataError, ValueError: see `FolderData`.
    """

    num_classes = 11
    class_names = (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    )
    palette = (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    )
    splits: ClassVar = {"train": 367, "val": 101, "test": 233}
    table = label_table(range(11), ignored=[11])

    def __init__(
        self,
        root: str,
        crop_size: tuple[int, int] = (360, 480),
        base_size: int = 480,
        scale_steps: int = 16,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(root, crop_size, base_size, scale_steps, batch_size, **options)

    def find_pairs(self, split: str) -> Found:
        return pair_by_name(self.root / split, self.root / f"{split}annot")
