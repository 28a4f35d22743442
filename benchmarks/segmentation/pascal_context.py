"""Pascal Context: 59 classes and the background, on the images of Pascal VOC 2010."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from .datasets import DataError, Pair, files_by_stem, label_table
from .folders import FolderData, first_folder
from .montage import class_colors
from .protocol import MULTI_SCALE, Protocol, by_name

NAMES = (
    *("background", "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle"),
    *("building", "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow", "cup", "curtain"),
    *("dog", "door", "fence", "floor", "flower", "food", "grass", "ground", "horse", "keyboard", "light"),
    *("motorbike", "mountain", "mouse", "person", "plate", "platform", "potted plant", "road", "rock", "sheep"),
    *("shelves", "sidewalk", "sign", "sky", "snow", "sofa", "table", "track", "train", "tree", "truck"),
    *("tv monitor", "wall", "water", "window", "wood"),
)
# Category ids of trainval_merged.json, in the order of NAMES
CATEGORY_IDS = (
    *(0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158),
    *(159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366),
    *(368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
)
LABEL_FOLDER = "context_labels"  # written by `gsto prepare pascal_context`: <split>/<image>.png, 0 = background
_SIZES: dict[str, Any] = {"long_side": 520, "window": (480, 480), "stride": (320, 320)}


class PascalContextData(FolderData):
    """Pascal Context: `JPEGImages/*.jpg` and, by `gsto prepare pascal_context`, `context_labels/{train,val}/*.png`.

    The images may also lie in `VOCdevkit/VOC2010/JPEGImages` or `VOC2010/JPEGImages`.

    Args:
        root: folder that holds images and labels.
        classes: 59, where the background is ignored, or 60, where it is class 0.
        crop_size, base_size, scale_steps, batch_size, options: see `FolderData`.

    Raises:
        DataError, ValueError: see `FolderData`; a number of classes other than 59 and 60.
    """

    splits: ClassVar = {"train": 4998, "val": 5105}
    protocols = by_name(
        Protocol(**_SIZES), Protocol(flip=True, **_SIZES), Protocol((*MULTI_SCALE, 2.0), flip=True, **_SIZES)
    )

    def __init__(
        self,
        root: str,
        classes: Literal[59, 60] = 59,
        crop_size: tuple[int, int] = (480, 480),
        base_size: int = 520,
        scale_steps: int = 16,
        batch_size: int = 16,
        **options: Any,
    ) -> None:
        if classes not in (59, 60):
            raise ValueError(f"classes must be 59 or 60, got {classes}")
        first = 60 - classes
        self.num_classes, self.class_names = classes, NAMES[first:]
        self.palette = tuple((int(r), int(g), int(b)) for r, g, b in class_colors(60)[first:])
        self.table = label_table(range(first, 60), ignored=range(first))
        super().__init__(root, crop_size, base_size, scale_steps, batch_size, **options)

    @property
    def image_folder(self) -> Path:
        places = (self.root, self.root / "VOCdevkit" / "VOC2010", self.root / "VOC2010")
        return first_folder(*(place / "JPEGImages" for place in places))

    def find_pairs(self, split: str) -> list[Pair]:
        folder = self.root / LABEL_FOLDER / split
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; `gsto prepare pascal_context` makes it of trainval_merged.json")
        images, labels = files_by_stem(self.image_folder), files_by_stem(folder)
        for stem in sorted(labels.keys() - images.keys()):
            raise DataError(f"{labels[stem]} has no image of the same name in {self.image_folder}")
        return [Pair(images[stem], labels[stem], images[stem].name) for stem in sorted(labels)]
