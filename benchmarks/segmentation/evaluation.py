"""Evaluating a network on a data set by one or more protocols, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from ..errors import UsageError
from .datamodules import SegmentationData
from .inference import Network, predict
from .metrics import InstanceIoU, Instances, class_accuracy, class_iou, summarize
from .protocol import Protocol
from .transforms import IGNORE

Predictions = dict[str, list[Tensor]]  # protocol's name -> class map (H, W) uint8 of every image of a batch


@dataclass(frozen=True)
class EvaluationOptions:
    """How `gsto validate`, `test` and `predict` evaluate; see `Protocol` for what the protocols are.

    Args:
        protocols: names of the data set's protocols, such as [ss, ms_flip]; None: the one used while training. Label files
            and overlays show the last one's predictions.
        scales, flip, fuse, window, stride, window_above: replace what the protocols say; a protocol's name follows.
        instances: measure iIoU where the data set has instance ids (`gsto validate` on Cityscapes).
        overlays: number of images to show with their predictions; None: 8, and all for `gsto predict`.
        out: folder of the results; None: the command's name in trainer.default_root_dir.
    """

    protocols: list[str] | None = None
    scales: list[float] | None = None
    flip: bool | None = None
    fuse: Literal["softmax", "exp"] | None = None
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    window_above: float | None = None
    instances: bool = True
    overlays: int | None = None
    out: str | None = None

    def choose(self, offered: dict[str, Protocol]) -> dict[str, Protocol]:
        """The protocols to evaluate by, under their names.

        Raises:
            UsageError: a name that the data set does not offer, or a value that a protocol cannot have.
        """
        names = self.protocols or [next(iter(offered))]
        for name in names:
            if name not in offered:
                raise UsageError(f"evaluation.protocols: there is no {name!r} here; there are {', '.join(offered)}")
        given = {
            "scales": None if self.scales is None else tuple(self.scales),
            "flip": self.flip,
            "fuse": self.fuse,
            "window": self.window,
            "stride": self.stride,
            "window_above": self.window_above,
        }
        given = {name: value for name, value in given.items() if value is not None}
        try:
            chosen = [replace(offered[name], **given) for name in names]
        except ValueError as error:
            raise UsageError(f"evaluation: {error}") from error
        return {protocol.name: protocol for protocol in chosen}


@dataclass
class Result:
    """What an evaluation by one protocol gave.

    Attributes:
        confusion: (C, C) counts on the CPU, rows: truth.
        figures: the means, under keys that name the protocol.
        iou, accuracy: of every class; NaN for an absent one.
        instance_iou: of every class, None where it was not measured.
    """

    confusion: Tensor
    figures: dict[str, float]
    iou: list[float]
    accuracy: list[float]
    instance_iou: list[float] | None = None


class Evaluator(nn.Module):
    """Sums over a data set, of predictions by one or more protocols; its size does not depend on the number of images.

    Args:
        num_classes: C.
        protocols: by their names.
        flip_pairs: classes that change places in a mirrored image.
        instances: of the samples; None: iIoU is not measured.
    """

    def __init__(
        self,
        num_classes: int,
        protocols: dict[str, Protocol],
        flip_pairs: Sequence[tuple[int, int]] = (),
        instances: Instances | None = None,
    ) -> None:
        super().__init__()
        self.protocols, self.flip_pairs, self.instances = protocols, flip_pairs, instances
        self.confusions = nn.ModuleList(
            MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False) for _ in protocols
        )
        self.instance_ious = nn.ModuleList([] if instances is None else [InstanceIoU(instances) for _ in protocols])

    def update(
        self, network: Network, images: Tensor, labels: Tensor | Sequence[Tensor], names: Sequence[str]
    ) -> Predictions:
        """Predict a batch and count it.

        Args:
            network: see `predict`.
            images: (N, 3, H, W) float32, normalised.
            labels: N labels (H', W') int64 with 255 = ignored; they say which size the predictions are to have.
            names: of the samples.
        """
        sizes = [(label.shape[-2], label.shape[-1]) for label in labels]
        ids = []
        if self.instances is not None:
            ids = [torch.from_numpy(self.instances.ids(name).astype(np.int64)) for name in names]
        predictions: Predictions = {}
        for position, (name, protocol) in enumerate(self.protocols.items()):
            squashed = [protocol.squash_label or size for size in sizes]
            classes = predict(network, images, squashed, protocol, self.flip_pairs)
            for prediction, label in zip(classes, labels, strict=True):
                if label.shape != prediction.shape:
                    label = F.interpolate(label[None, None].float(), size=prediction.shape)[0, 0].long()  # nearest
                self.confusions[position].update(prediction[None], label[None])
            for prediction, instance_ids in zip(classes, ids, strict=bool(ids)):
                self.instance_ious[position].update(prediction, instance_ids)
            predictions[name] = [prediction.to(torch.uint8) for prediction in classes]
        return predictions

    def compute(self) -> dict[str, Result]:
        """The results by protocol, over all processes; counting begins anew."""
        results = {}
        for position, name in enumerate(self.protocols):
            confusion = self.confusions[position].compute().cpu()
            iou, accuracy = class_iou(confusion), class_accuracy(confusion)
            results[name] = Result(confusion, summarize(confusion, name), iou.tolist(), accuracy.tolist())
            if self.instances is not None:
                metric = self.instance_ious[position]
                iou = metric.class_iou(metric.compute(), confusion)
                results[name].instance_iou = iou.tolist()
                results[name].figures[f"iIoU_{name}"] = float(torch.nan_to_num(iou.nanmean(), 0.0))
        for metric in (*self.confusions, *self.instance_ious):
            metric.reset()
        return results


def make_evaluator(data: SegmentationData, options: EvaluationOptions, stage: str) -> Evaluator:
    """The evaluator for a data set and a command ("fit", "validate", "test" or "predict").

    Raises:
        UsageError: options that the data set does not have.
    """
    protocols = options.choose(data.protocols)
    headline = next(iter(data.protocols))
    if stage == "fit" and headline not in protocols:
        raise UsageError(
            f"evaluation: training chooses best.ckpt by mIoU_{headline}, but the protocols are {', '.join(protocols)}"
        )
    instances = data.instances() if options.instances and stage == "validate" else None
    return Evaluator(data.num_classes, protocols, data.flip_pairs, instances)
