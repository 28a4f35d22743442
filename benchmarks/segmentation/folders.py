"""What the data modules of the public data sets share: a root folder, splits, label values, training crops."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import numpy as np

from ..images import files_by_stem
from .datamodules import SegmentationData
from .datasets import DataError, Found, Pair, PairDataset
from .transforms import EvalTransform, TrainTransform
from .verification import check


class FolderData(SegmentationData):
    """A data set of image and label files in its public layout.

    Args:
        root: the data set's folder.
        crop_size: (height, width) of the training crops.
        base_size: long side in pixels of the images at training scale 1.
        scale_steps: K of the training scale 0.5 + randint(0, K) / 10.
        batch_size, val_batch_size, num_workers: see `SegmentationData`.
        train_split, val_split, test_split: the splits to train on, evaluate on (`gsto validate`) and predict (`gsto test`);
            several are joined by +, as in train+val.
        lists: folder of the files `<split>.lst`, which then say what belongs to a split: lines of an image and a label file
            relative to `root` (the label may be missing in a test split). None: all files of the layout.
        images: folder of images of any kind and size, for `gsto predict`.

    Attributes:
        splits: the published number of images of every split.
        table: the value in a label file -> class; see `PairDataset`.
        squash: (height, width) that every image is resized to, whatever its shape.

    Raises:
        DataError: in `setup`, for a split that does not exist, a missing folder, an unpaired or unreadable file, an image and
            a label of different sizes or a label value out of range; it names the file.
        ValueError: a size or number out of range.
    """

    splits: dict[str, int]
    table: np.ndarray
    squash: tuple[int, int] | None = None

    def __init__(
        self,
        root: str,
        crop_size: tuple[int, int],
        base_size: int,
        scale_steps: int,
        batch_size: int,
        val_batch_size: int = 1,
        num_workers: int | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        lists: str | None = None,
        images: str | None = None,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers)
        self.root = Path(root)
        self.lists = None if lists is None else Path(lists)
        self.images = None if images is None else Path(images)
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.augment = TrainTransform(crop_size, base_size, scale_steps, squash=self.squash, flip_pairs=self.flip_pairs)
        self.plain = EvalTransform(self.squash)

    @abstractmethod
    def find_pairs(self, split: str) -> Found:
        """The files of one split by the public layout; a folder that is missing is a DataError."""

    @property
    def label_values(self) -> list[int]:
        return [int(np.flatnonzero(self.table == index)[0]) for index in range(self.num_classes)]

    def open_split(self, names: str) -> PairDataset:
        """The data set of one or more splits, its files listed but not read."""
        pairs: list[Pair] = []
        for split in self._names(names):
            found = self.find_pairs(split) if self.lists is None else self._listed(split)
            if found.problems:
                raise DataError(*found.problems)
            pairs += found.pairs
        return self.dataset(pairs)

    def _names(self, names: str) -> list[str]:
        for split in names.split("+"):
            if split not in self.splits:
                raise DataError(f"{type(self).__name__} has no split {split!r}; it has {', '.join(self.splits)}")
        return names.split("+")

    def dataset(self, pairs: list[Pair]) -> PairDataset:
        """These files as this data set's labels and transforms read them."""
        return PairDataset(pairs, self.table, self.augment, self.plain)

    @property
    def train_size(self) -> tuple[int, int]:
        return self.augment.crop_size

    def count_train_images(self) -> tuple[int, str]:
        try:
            return len(self.open_split(self.train_split)), f"listed in {self.root}"
        except DataError as error:
            published = sum(self.splits[name] for name in self._names(self.train_split))
            return published, f"as published, since {str(error).splitlines()[0]}"

    def make_train_set(self) -> PairDataset:
        return self._checked(self.train_split)

    def make_val_set(self) -> PairDataset:
        return self._checked(self.val_split)

    def make_test_set(self) -> PairDataset:
        return self._checked(self.test_split)

    def make_predict_set(self) -> PairDataset:
        if self.images is None:
            raise DataError("gsto predict needs --data.images FOLDER: the images to predict")
        return self.dataset([Pair(file, None, file.name) for file in files_by_stem(self.images).values()])

    def _checked(self, names: str) -> PairDataset:
        dataset = self.open_split(names)
        check(dataset, f"Checking {names}")
        return dataset

    def _listed(self, split: str) -> Found:
        file = self.lists / f"{split}.lst"
        if not file.is_file():
            raise DataError(f"{file}: no such list")
        pairs = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split("\t") if "\t" in line else line.split()
            if words and len(words) > 2:
                raise DataError(f"{file}, line {number}: must be an image and a label file, got {line!r}")
            if words:
                pairs.append(Pair(self.root / words[0], self.root / words[1] if len(words) == 2 else None, words[0]))
        if not pairs:
            raise DataError(f"{file}: no files in this list")
        return Found(pairs, [])


def first_folder(*candidates: Path) -> Path:
    """The first of these folders that exists; the first of all, for a message to name, where none does."""
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])
