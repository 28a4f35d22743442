"""Cityscapes: fine annotations, 19 classes of 34 label ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..images import decode_label
from .datasets import DataError, Found, Pair, label_table
from .folders import FolderData
from .metrics import Instances
from .protocol import MULTI_SCALE, Protocol, by_name

LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of the classes 0 to 18
# Weights of the classes in the loss, as in HRNet's code; an option here: model.class_weights
CLASS_WEIGHTS = (
    *(0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023),
    *(0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507),
)
# Mean size in pixels of an instance in the training set, of the classes that have instances (for iIoU; the benchmark's values)
INSTANCE_SIZES = {
    11: 3462.4756337644,  # person
    12: 3930.4788056518,  # rider
    13: 12794.0202738185,  # car
    14: 27855.1264367816,  # truck
    15: 35732.1511111111,  # bus
    16: 67583.7075812274,  # train
    17: 6298.7200839748,  # motorcycle
    18: 4672.3249222261,  # bicycle
}
_IMAGE, _LABEL, _INSTANCES = "_leftImg8bit", "_gtFine_labelIds", "_gtFine_instanceIds"


class CityscapesData(FolderData):
    """Cityscapes: `leftImg8bit/{split}/{city}/*_leftImg8bit.png` and `gtFine/{split}/{city}/*_gtFine_labelIds.png`.

    Labels are read as label ids and mapped to the 19 classes; all other ids are ignored. The test split has no public labels:
    `gtFine/test` is not read. Train on train+val with `train_split="train+val"`.

    Args:
        root: folder that holds `leftImg8bit` and `gtFine`.
        crop_size, base_size, scale_steps, batch_size, options: see `FolderData`.

    Raises:
        DataError, ValueError: see `FolderData`.
    """

    num_classes = 19
    class_names = (
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    )
    palette = (
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    )
    splits: ClassVar = {"train": 2975, "val": 500, "test": 1525}
    table = label_table(LABEL_IDS, ignored=sorted(set(range(34)) - set(LABEL_IDS)))
    protocols = by_name(
        Protocol(),
        Protocol(flip=True),
        Protocol(MULTI_SCALE, flip=True, window=(1024, 2048), window_above=1.0),
    )

    def __init__(
        self,
        root: str,
        crop_size: tuple[int, int] = (512, 1024),
        base_size: int = 2048,
        scale_steps: int = 16,
        batch_size: int = 12,
        **options: Any,
    ) -> None:
        super().__init__(root, crop_size, base_size, scale_steps, batch_size, **options)

    def find_pairs(self, split: str) -> Found:
        images, labels = self.root / "leftImg8bit" / split, self.root / "gtFine" / split
        found = Found([], [])
        for file in _files(images, _IMAGE):
            label = labels / file.parent.name / file.name.replace(_IMAGE, _LABEL)
            if split == "test" or label.is_file():
                name = f"{file.parent.name}/{file.name}"
                found.pairs.append(Pair(file, None if split == "test" else label, name))
            else:
                found.problems.append(f"{file} has no label: {label} is missing")
        if split != "test":
            known = {pair.label for pair in found.pairs}
            lost = [file for file in _files(labels, _LABEL) if file not in known]
            found.problems.extend(f"{file} has no image of its name in {images}" for file in lost)
        return found

    def instances(self) -> Instances:
        labels = {pair.name: pair.label for pair in self.val_set.pairs}

        def ids(name: str) -> np.ndarray:
            label = labels[name]
            return decode_label(label.with_name(label.name.replace(_LABEL, _INSTANCES)), np.uint16)

        return Instances(ids, INSTANCE_SIZES, LABEL_IDS)

    def prediction_name(self, name: str) -> str:
        """As the benchmark's server finds it: <city>_<sequence>_<frame>_labelIds.png."""
        return f"{Path(name).stem.removesuffix(_IMAGE)}_labelIds.png"


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = sorted(folder.glob(f"*/*{suffix}.png"))
    if not files:
        raise DataError(f"{folder}: no files {{city}}/*{suffix}.png")
    return files
