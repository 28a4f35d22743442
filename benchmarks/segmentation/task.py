"""The Lightning task that trains and evaluates a segmentation network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor

import gsto_models

from ..training import TrainingTask
from .evaluation import EvaluationOptions, Evaluator, Predictions, Result, make_evaluator
from .evaluation_report import EvaluationReport
from .inference import predict
from .loss import HardPixels, segmentation_loss
from .protocol import Protocol, by_name
from .report import SegmentationReport

Batch = tuple[Tensor, Tensor, Sequence[str]]


class SegmentationTask(TrainingTask):
    """Trains a network of `gsto_models` for segmentation, and evaluates it by one confusion matrix over a set.

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
        evaluation: how it is evaluated.
        options: further options of `gsto_models.create_model`, for example {output_stride: 16, gate: supervised}.
        **training: how it is trained; see `TrainingTask`.

    Metrics: `train/loss`, `train/lr`; for every protocol, such as ss, `val/mIoU_ss`, `val/mIoU_ss_absent_as_zero`,
    `val/pixel_acc_ss`, `val/mean_acc_ss`, for Cityscapes also `val/iIoU_ss`; `test/...` of a test set with labels.

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
        evaluation: EvaluationOptions = EvaluationOptions(),  # noqa: B008 - frozen
        options: dict[str, Any] | None = None,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.save_hyperparameters(ignore="evaluation")
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
        self.evaluation = evaluation
        self.evaluator = Evaluator(num_classes, by_name(Protocol()))  # until `setup` knows the data set
        self.results: dict[str, Result] = {}  # of the latest evaluation, by protocol

    def make_reports(self, folder: Path) -> list[Callback]:
        return [SegmentationReport(folder)]

    def make_evaluation_reports(self, folder: Path) -> list[Callback]:
        return [EvaluationReport(Path(self.evaluation.out or folder), self.evaluation.overlays)]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.evaluator = make_evaluator(self.trainer.datamodule, self.evaluation, stage)

    def training_loss(self, batch: Batch) -> Tensor:
        images, labels, _ = batch
        return segmentation_loss(self(images), labels, self.loss_weights, self.class_weights, self.hard_pixels)

    def predict_labels(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Class maps (H, W) int64 of these sizes by the first of the evaluation's protocols; the task must be in eval mode."""
        protocol = next(iter(self.evaluator.protocols.values()))
        return predict(self, images, sizes, protocol, self.evaluator.flip_pairs)

    def validation_step(self, batch: Batch, batch_idx: int) -> Predictions:
        return self.evaluator.update(self, *batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Predictions:
        return self.evaluator.update(self, *batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Predictions:
        return self.evaluator.update(self, *batch)

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test")

    def _finish_evaluation(self, prefix: str) -> None:
        self.results = self.evaluator.compute()
        for result in self.results.values():
            if result.confusion.any():  # a test set without labels has no figures
                # equal in all processes: what they come from was summed over them
                self.log_dict({f"{prefix}/{name}": value for name, value in result.figures.items()}, sync_dist=True)
