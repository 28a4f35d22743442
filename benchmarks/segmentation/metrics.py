"""Figures of an evaluation, from sums over a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric


def class_iou(confusion: Tensor) -> Tensor:
    """IoU = TP / (TP + FP + FN) of every class from a (C, C) matrix of counts (rows: truth); absent classes are NaN."""
    counts = confusion.double()
    hits = counts.diag()
    return hits / (counts.sum(0) + counts.sum(1) - hits)  # 0 / 0 = NaN


def class_accuracy(confusion: Tensor) -> Tensor:
    """The share of every class' pixels that was found, from a (C, C) matrix of counts; classes without truth are NaN."""
    counts = confusion.double()
    return counts.diag() / counts.sum(1)


def summarize(confusion: Tensor, protocol: str) -> dict[str, float]:
    """The figures of one evaluation; the keys name the protocol.

    `mIoU_<protocol>` leaves out classes that are neither in the labels nor in the predictions (cityscapesScripts' rule),
    `mIoU_<protocol>_absent_as_zero` counts them as 0 (HRNet's rule). `mean_acc_<protocol>` is the mean recall of the classes
    in the labels. Without a single labelled pixel all figures are 0.
    """
    counts = confusion.double()
    iou = class_iou(confusion)
    figures = {
        f"mIoU_{protocol}": iou.nanmean(),
        f"mIoU_{protocol}_absent_as_zero": iou.nan_to_num(0).mean(),
        f"pixel_acc_{protocol}": counts.diag().sum() / counts.sum(),
        f"mean_acc_{protocol}": class_accuracy(confusion).nanmean(),
    }
    return {name: float(torch.nan_to_num(value, 0.0)) for name, value in figures.items()}


def constant_prediction(confusion: Tensor) -> dict[str, float]:
    """The figures of predicting one class everywhere: the class (index) with the best mIoU, its mIoU and pixel accuracy.

    Args:
        confusion: (C, C) counts of any evaluation of the set; only the truth's frequencies, the sums of its rows, matter.
    """
    truth = confusion.sum(1)
    best = {"class": 0, "mIoU": -1.0, "pixel_acc": 0.0}
    for guess in range(len(truth)):
        constant = torch.zeros_like(confusion)
        constant[:, guess] = truth
        figures = summarize(constant, "ss")
        if figures["mIoU_ss"] > best["mIoU"]:
            best = {"class": guess, "mIoU": figures["mIoU_ss"], "pixel_acc": figures["pixel_acc_ss"]}
    return best


class Instances(NamedTuple):
    """Where the instances of a data set come from.

    Attributes:
        ids: sample's name -> instance ids (H, W), label id * 1000 + number; ids up to 1000 are no instances.
        mean_sizes: class -> mean size of its instances in pixels, for the classes that have instances.
        label_ids: of the classes.
    """

    ids: Callable[[str], np.ndarray]
    mean_sizes: dict[int, float]
    label_ids: Sequence[int]


class InstanceIoU(Metric):
    """Cityscapes' iIoU: IoU in which an instance of a class counts the more the smaller it is.

    A pixel of an instance weighs (mean size of the class' instances) / (size of this instance) in true positives and false
    negatives; false positives weigh 1. Pixels of the class that belong to no instance (groups) count in neither.

    Args:
        instances: which classes have instances, and of which size.
    """

    full_state_update = False

    def __init__(self, instances: Instances) -> None:
        super().__init__()
        num_classes, label_ids = len(instances.label_ids), instances.label_ids
        self.mean_size = torch.zeros(num_classes, dtype=torch.float64)
        self.class_of = torch.full((max(label_ids) + 2,), -1)  # the last place: ids beyond, which are of no class
        for index, size in instances.mean_sizes.items():
            self.mean_size[index] = size
            self.class_of[label_ids[index]] = index
        for name in ("hits", "misses"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, instances: Tensor) -> None:
        """Count one image.

        Args:
            prediction: classes (H, W) int64.
            instances: instance ids (H, W) int64; ids up to 1000 are no instances.
        """
        pixels, predicted = instances.flatten().cpu(), prediction.flatten().cpu()
        predicted, pixels = predicted[pixels > 1000], pixels[pixels > 1000]
        ids, place, size = pixels.unique(return_inverse=True, return_counts=True)
        classes = self.class_of[(ids // 1000).clamp(max=len(self.class_of) - 1)]
        found = torch.bincount(place[predicted == classes[place]], minlength=len(ids)).double()
        kept = classes >= 0
        classes, found, size = classes[kept], found[kept], size[kept].double()
        weight = self.mean_size[classes] / size
        self.hits += torch.zeros_like(self.mean_size).index_add_(0, classes, found * weight).to(self.hits.device)
        self.misses += (
            torch.zeros_like(self.mean_size).index_add_(0, classes, (size - found) * weight).to(self.hits.device)
        )

    def compute(self) -> Tensor:
        """Sums over the set: (2, C) float64, weighted true positives and false negatives; see `class_iou`."""
        return torch.stack([self.hits, self.misses])

    def class_iou(self, sums: Tensor, confusion: Tensor) -> Tensor:
        """iIoU of every class (C,) float64; NaN for classes that have no instances by nature, or are absent.

        Args:
            sums: of `compute`.
            confusion: (C, C) counts of the same predictions; false positives come from here.
        """
        hits, misses = sums.cpu()
        counts = confusion.double().cpu()
        wrong = counts.sum(0) - counts.diag()
        return (hits / (hits + misses + wrong)).where(self.mean_size > 0, torch.nan)
