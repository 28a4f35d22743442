"""Figures from one confusion matrix over a whole data set."""

from __future__ import annotations

import torch
from torch import Tensor


def class_iou(confusion: Tensor) -> Tensor:
    """IoU = TP / (TP + FP + FN) of every class from a (C, C) matrix of counts (rows: truth); absent classes are NaN."""
    counts = confusion.double()
    hits = counts.diag()
    return hits / (counts.sum(0) + counts.sum(1) - hits)  # 0 / 0 = NaN


def summarize(confusion: Tensor) -> dict[str, float]:
    """The figures of one single-scale evaluation; the keys name the protocol.

    `mIoU_ss` leaves out classes that are neither in the labels nor in the predictions (cityscapesScripts' rule),
    `mIoU_ss_absent_as_zero` counts them as 0 (HRNet's rule). `mean_acc` is the mean recall of the classes in the labels.
    Without a single labelled pixel all figures are 0.
    """
    counts = confusion.double()
    hits, truth = counts.diag(), counts.sum(1)
    iou, recall = class_iou(confusion), hits / truth
    figures = {
        "mIoU_ss": iou.nanmean(),
        "mIoU_ss_absent_as_zero": iou.nan_to_num(0).mean(),
        "pixel_acc": hits.sum() / counts.sum(),
        "mean_acc": recall.nanmean(),
    }
    return {name: float(torch.nan_to_num(value, 0.0)) for name, value in figures.items()}
