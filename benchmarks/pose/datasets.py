"""Datasets of persons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from ..images import decode_image
from ..sampling import Draw
from .annotations import Person
from .boxes import crop_matrix, region_of
from .transforms import Augmentation, crop, train_sample


class TrainSample(NamedTuple):
    """Input (H, W, 3) uint8, joints (17, 3) float32 (x, y, weight; see `encode`) and the sample's name."""

    image: Tensor
    joints: Tensor
    name: str


class EvalSample(NamedTuple):
    """Input (H, W, 3) uint8, the person's number in the data set, and the sample's name."""

    image: Tensor
    index: int
    name: str


class PersonDataset(Dataset):
    """One sample for every person.

    `dataset[index]` is an `EvalSample`; `dataset[Draw(index, seed)]` is a `TrainSample`, augmented by `seed` alone.

    Args:
        people: whom.
        size: (height, width) of the network's input.
        augmentation: of drawn samples.

    Raises:
        DataError: when a sample is read, for an image that is missing, broken, or of another size than its annotation says.
    """

    def __init__(
        self, people: Sequence[Person], size: tuple[int, int], augmentation: Augmentation | None = None
    ) -> None:
        self.people, self.size, self.augmentation = list(people), size, augmentation or Augmentation()

    def __len__(self) -> int:
        return len(self.people)

    def read(self, index: int) -> np.ndarray:
        """The whole image (H, W, 3) uint8 RGB that a person is on."""
        picture = self.people[index].picture
        image = decode_image(picture.file)
        if image.shape[:2] != picture.size:
            sizes = " instead of ".join(f"{h}x{w}" for h, w in (image.shape[:2], picture.size))
            raise DataError(f"{picture.file}: the image is {sizes} (height x width), as its annotation says")
        return image

    def __getitem__(self, item: int | Draw) -> TrainSample | EvalSample:
        index = item.index if isinstance(item, Draw) else item
        person, image = self.people[index], self.read(index)
        name = f"{person.picture.file.name}#{index}"
        if isinstance(item, Draw):
            rng = np.random.default_rng(item.seed)
            pixels, joints = train_sample(image, person, self.size, self.augmentation, rng)
            return TrainSample(torch.from_numpy(pixels), torch.from_numpy(joints), name)
        region = region_of(person.box, self.size[1] / self.size[0])
        return EvalSample(torch.from_numpy(crop(image, crop_matrix(region, self.size), self.size)), index, name)
