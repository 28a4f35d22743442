"""Pascal Context: 59 classes and the background, on the images of Pascal VOC 2010."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from rich.progress import track

from ..images import files_by_stem
from .datasets import DataError, Found, Pair, label_table
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

    def find_pairs(self, split: str) -> Found:
        folder = self.root / LABEL_FOLDER / split
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; `gsto prepare pascal_context` makes it of trainval_merged.json")
        images, labels = files_by_stem(self.image_folder), files_by_stem(folder)
        lost = sorted(labels.keys() - images.keys())
        return Found(
            [Pair(images[stem], labels[stem], images[stem].name) for stem in sorted(labels.keys() & images.keys())],
            [f"{labels[stem]} has no image of the same name in {self.image_folder}" for stem in lost],
        )


def convert_annotations(data: PascalContextData, file: Path) -> dict[str, int]:
    """Write the label PNGs of all images of the official annotations: `context_labels/{train,val}/<image>.png`.

    The annotations of an image are painted in the file's order, so that a later one covers an earlier one.

    Args:
        data: the data set, in whose root the folder is made.
        file: `trainval_merged.json`.

    Returns:
        The number of labels written for each split.

    Raises:
        DataError: no such file, or one of another kind; an annotation with an unknown category or of another size than its image.
        ModuleNotFoundError: pycocotools, which decodes the masks, is not installed.
    """
    from pycocotools import mask as masks

    if not file.is_file():
        raise DataError(f"{file}: no such file; it is the annotation file of the Pascal in Detail challenge")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        annotations = defaultdict(list)
        for annotation in content["annos_segmentation"]:
            annotations[annotation["image_id"]].append(annotation)
        images = [image for image in content["images"] if image["phase"] in data.splits]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not the annotations of Pascal Context ({type(error).__name__}: {error})") from error
    classes = {category: index for index, category in enumerate(CATEGORY_IDS)}
    written = dict.fromkeys(data.splits, 0)
    for image in track(images, "Writing labels", transient=True, disable=not sys.stdout.isatty()):
        label = np.zeros((image["height"], image["width"]), np.uint8)
        for annotation in annotations[image["image_id"]]:
            where = f"{file}: annotation {annotation['id']} of {image['file_name']}"
            if annotation["category_id"] not in classes:
                raise DataError(f"{where} has category {annotation['category_id']}, which is none of the 59")
            mask = masks.decode(annotation["segmentation"])
            if mask.shape != label.shape:
                raise DataError(f"{where} must have the image's size {label.shape}, got {mask.shape} (height, width)")
            label[mask > 0] = classes[annotation["category_id"]]
        folder = data.root / LABEL_FOLDER / image["phase"]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imencode(".png", label)[1].tofile(folder / f"{Path(image['file_name']).stem}.png")
        written[image["phase"]] += 1
    return written
