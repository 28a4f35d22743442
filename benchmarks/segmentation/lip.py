"""LIP, Look into Person: human parsing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from ..images import files_by_stem
from .datasets import Found, Pair, label_table, pair_by_name
from .folders import FolderData, first_folder
from .montage import class_colors
from .protocol import Protocol, by_name

SIDE = 473  # pixels; every image is squashed to a square of this side (paper, Section 4.2)


class LIPData(FolderData):
    """LIP: `{train,val}_images/*.jpg` and `{train,val}_segmentations/*.png`, 20 classes with the background.

    The folders may also lie in `TrainVal_images/` and `TrainVal_parsing_annotations/`, as they come out of the archives, and
    `test_images/` in `Testing_images/`; the test split has no labels. The protocol `ss_flip` is the one that papers report:
    whole images squashed to 473x473, their flips with left and right swapped, all pixels of the original labels.
    `ss_squashed` compares at 473x473, which is quicker and no published number.

    Args:
        root: folder that holds these folders.
        crop_size, base_size, scale_steps, batch_size, val_batch_size, options: see `FolderData`; sizes are the squashed image's.

    Raises:
        DataError, ValueError: see `FolderData`.
    """

    num_classes = 20
    class_names = (
        "background",
        "hat",
        "hair",
        "glove",
        "sunglasses",
        "upper clothes",
        "dress",
        "coat",
        "socks",
        "pants",
        "jumpsuit",
        "scarf",
        "skirt",
        "face",
        "left arm",
        "right arm",
        "left leg",
        "right leg",
        "left shoe",
        "right shoe",
    )
    palette = tuple((int(r), int(g), int(b)) for r, g, b in class_colors(20))
    flip_pairs = ((14, 15), (16, 17), (18, 19))
    splits: ClassVar = {"train": 30462, "val": 10000, "test": 10000}
    table = label_table(range(20), ignored=[])
    squash = (SIDE, SIDE)
    protocols = by_name(Protocol(), Protocol(flip=True), Protocol(squash_label=(SIDE, SIDE)))

    def __init__(
        self,
        root: str,
        crop_size: tuple[int, int] = (SIDE, SIDE),
        base_size: int = SIDE,
        scale_steps: int = 11,
        batch_size: int = 40,
        val_batch_size: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(root, crop_size, base_size, scale_steps, batch_size, val_batch_size, **options)

    def find_pairs(self, split: str) -> Found:
        if split == "test":
            files = files_by_stem(self._folder("test_images", "Testing_images"))
            return Found([Pair(file, None, file.name) for file in files.values()], [])
        images = self._folder(f"{split}_images", "TrainVal_images")
        return pair_by_name(images, self._folder(f"{split}_segmentations", "TrainVal_parsing_annotations"))

    def _folder(self, name: str, archive: str) -> Path:
        return first_folder(self.root / name, self.root / archive / name, self.root / archive / archive / name)
