"""The Lightning task that trains and evaluates a segmentation network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

import gsto_models
import gsto_ops

from ..training import TrainingTask
from .loss import HardPixels, segmentation_loss
from .metrics import class_iou, summarize
from .transforms import IGNORE

Batch = tuple[Tensor, Tensor, Sequence[str]]


class SegmentationTask(TrainingTask):
    """Trains a network of `gsto_models` for segmentation, and evaluates it by one confusion matrix over the set.

    Args:
        num_classes: number of classes.
        name: a network of `gsto_models.list_models()`.
        gate_form: "paper" or "released"; None for the network's default. See `gsto_models.create_model`.
        gate_bias_init: None for gates without bias as in the paper; 4.0 starts with open gates, best from scratch.
        gated_fusion: overrides the network's default of having gates in its fusions.
        gated_transition: overrides the stages (of 1, 2 and 3) after which the network has a gated transition.
        bn_momentum: BatchNorm momentum; None for the network's default, 0.01. Short runs need more.
        pretrained: a weight file to start from, for example an ImageNet classifier; see `gsto_models.load_checkpoint`.
        loss_weights: weights of the main output and of the auxiliary ones, in HRNets those after stages 3, 2 and 1.
        class_weights: weights of the classes in the loss, one positive number for each; None for equal weights.
        ohem_threshold: online hard example mining in the main output: only pixels whose true class has a probability below
            it (0.9 in HRNet's recipes) count, but at least `ohem_min_kept` of each batch. None for all pixels.
        ohem_min_kept: pixels.
        options: further options of `gsto_models.create_model`, for example {output_stride: 16, gate: supervised}.
        **training: how it is trained; see `TrainingTask`.

    Metrics: `train/loss`, `train/lr`; `val/mIoU_ss`, `val/mIoU_ss_absent_as_zero`, `val/pixel_acc`, `val/mean_acc`.

    Raises:
        ValueError: what `TrainingTask`, `HardPixels` or `create_model` rejects; class weights that are too few or not positive.
        TrainingError: while training, when the loss is not finite.
    """

    headline = "val/mIoU_ss"

    def __init__(
        self,
        num_classes: int,
        name: str = "gsto_hrnet_w18_small_v2",
        gate_form: Literal["paper", "released"] | None = None,
        gate_bias_init: float | None = None,
        gated_fusion: bool | None = None,
        gated_transition: list[int] | None = None,
        bn_momentum: float | None = None,
        pretrained: str | None = None,
        loss_weights: list[float] = [1.0, 0.5, 0.3, 0.2],  # noqa: B006 - jsonargparse reads the default; it is never changed
        class_weights: list[float] | None = None,
        ohem_threshold: float | None = None,
        ohem_min_kept: int = 131_072,
        options: dict[str, Any] | None = None,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.save_hyperparameters()
        if class_weights is not None and (len(class_weights) != num_classes or min(class_weights) <= 0):
            raise ValueError(f"class_weights must be {num_classes} numbers > 0, got {class_weights}")
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.loss_weights = loss_weights
        self.hard_pixels = None if ohem_threshold is None else HardPixels(ohem_threshold, ohem_min_kept)
        given = {
            "gate_form": gate_form,
            "gate_bias_init": gate_bias_init,
            "gated_fusion": gated_fusion,
            "gated_transition": None if gated_transition is None else tuple(gated_transition),
            "bn_momentum": bn_momentum,
        }
        given = {option: value for option, value in given.items() if value is not None} | (options or {})
        self.use(gsto_models.create_model(name, num_classes=num_classes, pretrained=pretrained, **given))
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)
        self.val_class_iou: list[float] = []  # of the latest evaluation; NaN for an absent class

    def make_reports(self, folder: Path) -> list[Callback]:
        from .report import RunReport  # report.py is about this task, and imports it

        return [RunReport(folder)]

    def training_loss(self, batch: Batch) -> Tensor:
        images, labels, _ = batch
        return segmentation_loss(self(images), labels, self.loss_weights, self.class_weights, self.hard_pixels)

    def predict_labels(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """The most likely class (N, H, W) int64 of every pixel, at `size` = (H, W); the task must be in eval mode."""
        logits = self(images).float()
        with torch.autocast(images.device.type, enabled=False):
            return gsto_ops.scale_transfer(logits, size=tuple(size)).argmax(1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels, _ = batch
        self.confusion.update(self.predict_labels(images, labels.shape[-2:]), labels)

    def on_validation_epoch_end(self) -> None:
        confusion = self.confusion.compute()
        self.confusion.reset()
        self.val_class_iou = class_iou(confusion).tolist()
        figures = {f"val/{name}": value for name, value in summarize(confusion).items()}
        self.log_dict(figures, sync_dist=True)  # equal in all processes: the matrix was summed over them
