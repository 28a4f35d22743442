"""COCO keypoints: train2017, val2017, test-dev2017, and anything in the same format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader

from ..errors import DataError
from ..images import decode_image, files_by_stem, normalize
from ..training import TrainingData
from .annotations import (
    Annotations,
    Person,
    Picture,
    check_files,
    read_annotations,
    read_detections,
    read_named_boxes,
)
from .codec import STRIDE
from .datasets import EvalSample, PersonDataset, TrainSample
from .keypoints import COUNT
from .transforms import Augmentation

_PUBLISHED_PERSONS = 149_813  # of train2017, with keypoints; for plans without the files


@dataclass(frozen=True)
class Split:
    """Where a split is, relative to the data set's root.

    Args:
        annotations: JSON with the images and, but for a test set, their persons; None: the published file.
        images: folder; None: images/NAME or NAME, as in HRNet's code or as the archives unpack.
        detections: JSON of a person detector's boxes; None: the published file.
    """

    annotations: str | None = None
    images: str | None = None
    detections: str | None = None


_DETECTIONS = "person_detection_results/COCO_{}_person.json"
PUBLISHED = {
    "train": Split("annotations/person_keypoints_train2017.json", "train2017"),
    "val": Split(
        "annotations/person_keypoints_val2017.json", "val2017", _DETECTIONS.format("val2017_detections_AP_H_56")
    ),
    "test": Split(
        "annotations/image_info_test-dev2017.json", "test2017", _DETECTIONS.format("test-dev2017_detections_AP_H_609")
    ),
}


class CocoData(TrainingData):
    """COCO keypoints, one sample per person.

    A training batch as the task sees it is a `TrainSample` of images (N, 3, H, W) float32 and joints (N, 17, 3), an evaluation
    batch an `EvalSample`. Training evaluates with the annotated boxes, `gsto validate` with those that `boxes` says.

    Args:
        root: the data set's folder.
        input_size: (height, width) of what the network sees of a person, multiples of 4.
        batch_size, val_batch_size, num_workers: see `TrainingData`.
        boxes: of `gsto validate`: a person detector's (the paper's protocol) or the annotated ones.
        augmentation: of training samples.
        train, val, test: where the splits are, if not in the published layout.
        images: folder of images for `gsto predict`.
        image_boxes: JSON of boxes on them, [{"file_name", "bbox", "score"}, ...]; None: one person fills each image.

    Raises:
        ValueError: an input size that is not allowed, a batch size under 1.
        DataError: in `setup`, for a file that is missing, malformed or of another split; it names the file.
    """

    num_classes = COUNT

    def __init__(
        self,
        root: str = "data/coco",
        input_size: tuple[int, int] = (384, 288),
        batch_size: int = 32,
        val_batch_size: int = 32,
        num_workers: int | None = None,
        boxes: Literal["detector", "ground_truth"] = "detector",
        augmentation: Augmentation = Augmentation(),  # noqa: B008 - frozen
        train: Split = Split(),
        val: Split = Split(),
        test: Split = Split(),
        images: str | None = None,
        image_boxes: str | None = None,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers)
        if min(input_size) < STRIDE or any(side % STRIDE for side in input_size):
            raise ValueError(f"input_size must be (height, width), multiples of {STRIDE}, got {tuple(input_size)}")
        if boxes not in ("detector", "ground_truth"):
            raise ValueError(f"boxes must be 'detector' or 'ground_truth', got {boxes!r}")
        self.root, self.input_size, self.boxes, self.augmentation = Path(root), tuple(input_size), boxes, augmentation
        self.splits = {"train": train, "val": val, "test": test}
        self.images, self.image_boxes = images, image_boxes

    def annotations(self, name: str) -> Annotations:
        """Read the annotation file of "train", "val" or "test"."""
        split, published = self.splits[name], PUBLISHED[name]
        folder = self.root / (split.images or f"images/{published.images}")
        if split.images is None and not folder.is_dir():
            folder = self.root / published.images
        return read_annotations(self.root / (split.annotations or published.annotations), folder)

    def detections_file(self, name: str) -> Path:
        """The detector file of "val" or "test"; it need not be there."""
        return self.root / (self.splits[name].detections or PUBLISHED[name].detections)

    def read_detections(self, name: str, annotations: Annotations) -> list[Person]:
        """The detector's boxes of "val" or "test"."""
        return read_detections(self.detections_file(name), annotations.pictures, annotations.file)[0]

    def setup(self, stage: str) -> None:
        """Open and check the data sets: bad files stop here, before the first step, in every process alike."""
        self.evaluated_boxes = "gt" if stage == "fit" or self.boxes == "ground_truth" else "det"
        super().setup(stage)
        expected = self.splits["val"].detections is not None or self.detections_file("val").is_file()
        if stage == "fit" and self.boxes == "detector" and expected:
            self.read_detections("val", self.val_annotations)  # for the evaluation after the run
        if stage == "test":
            self.test_set = self.make_test_set()
        if stage == "predict":
            self.predict_set = self.make_predict_set()

    def make_train_set(self) -> PersonDataset:
        return self._dataset(self._annotated(self.annotations("train")))

    def make_val_set(self) -> PersonDataset:
        self.val_annotations = self.annotations("val")
        if self.evaluated_boxes == "gt":
            return self._dataset(self._annotated(self.val_annotations))
        return self._dataset(self.read_detections("val", self.val_annotations))

    def make_test_set(self) -> PersonDataset:
        return self._dataset(self.read_detections("test", self.annotations("test")))

    def make_predict_set(self) -> PersonDataset:
        if self.images is None:
            raise DataError("gsto predict needs --data.images FOLDER: the images to predict")
        files = files_by_stem(Path(self.images)).values()
        pictures = [Picture(number, file, decode_image(file).shape[:2]) for number, file in enumerate(files)]
        if self.image_boxes is not None:
            return self._dataset(read_named_boxes(Path(self.image_boxes), pictures))
        return self._dataset([Person(picture, (0.0, 0.0, *map(float, picture.size[::-1]))) for picture in pictures])

    def _annotated(self, annotations: Annotations) -> list[Person]:
        if not annotations.people:
            skipped = ", ".join(f"{number} {reason}" for reason, number in annotations.skipped.items())
            raise DataError(f"{annotations.file}: no person with keypoints in it (skipped: {skipped or 'none'})")
        return annotations.people

    def _dataset(self, people: Sequence[Person]) -> PersonDataset:
        check_files(list({person.picture.id: person.picture for person in people}.values()))
        return PersonDataset(people, self.input_size, self.augmentation)

    def count_train_images(self) -> tuple[int, str]:
        try:
            return len(self._annotated(self.annotations("train"))), "persons in the annotation file"
        except DataError as error:
            return _PUBLISHED_PERSONS, f"persons, as published, since {str(error).splitlines()[0]}"

    def example_batch(self, size: int) -> TrainSample:
        images = torch.zeros(size, 3, *self.input_size).contiguous(memory_format=torch.channels_last)
        return TrainSample(images, torch.zeros(size, COUNT, 3), ["example"] * size)

    def on_after_batch_transfer(
        self, batch: TrainSample | EvalSample, dataloader_idx: int = 0
    ) -> TrainSample | EvalSample:
        return batch._replace(image=normalize(batch.image))

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        return self.evaluation_loader(self.predict_set)
