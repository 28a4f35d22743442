"""The Lightning task that trains and evaluates a pose network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback
from torch import Tensor

import gsto_models

from ..training import TrainingTask
from .datasets import EvalSample, TrainSample
from .evaluation import EvaluationOptions, Evaluator, measure
from .loss import pose_loss
from .report import EvaluationReport, PoseReport
from .scoring import Pose, evaluator_name


class PoseTask(TrainingTask):
    """Trains a network of `gsto_models` on heatmaps of joints, and evaluates it by COCO's figures.

    Args:
        num_classes: number of joints.
        name: a network of `gsto_models.list_models("pose")`.
        gate_form: "paper" or "released"; None for the network's default. See `gsto_models.create_model`.
        gate_bias_init: None for gates without bias as in the paper; 4.0 starts with open gates, best from scratch.
        bn_momentum: BatchNorm momentum; None for the network's default, 0.1.
        pretrained: a weight file to start from, for example an ImageNet classifier; see `gsto_models.load_checkpoint`.
        loss_weights: weights of the main output and of those after stages 3 and 2.
        sigma: of the joints' Gaussians, in pixels of the heatmap.
        evaluation: how it is evaluated.
        options: further options of `gsto_models.create_model`.
        **training: how it is trained; see `TrainingTask`.

    Metrics: `train/loss`, `train/lr`; for a protocol such as gt_flip (annotated boxes, mirrored images averaged in)
    `val/AP_gt_flip` and with it AP50, AP75, APM, APL, AR, AR50, AR75, ARM, ARL; see `EvaluationOptions.protocol`.

    Raises:
        ValueError: what `TrainingTask` or `create_model` rejects; a sigma that is not positive.
        TrainingError: while training, when the loss is not finite.
    """

    def __init__(
        self,
        num_classes: int,
        name: str = "gsto_hrnet_w32",
        gate_form: Literal["paper", "released"] | None = None,
        gate_bias_init: float | None = None,
        bn_momentum: float | None = None,
        pretrained: str | None = None,
        loss_weights: list[float] = [1.0, 0.5, 0.3],  # noqa: B006 - jsonargparse reads the default; it is never changed
        sigma: float = 3.0,
        evaluation: EvaluationOptions = EvaluationOptions(),  # noqa: B008 - frozen
        options: dict[str, Any] | None = None,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.save_hyperparameters(ignore="evaluation")
        if not sigma > 0:
            raise ValueError(f"sigma must be > 0, got {sigma}")
        given = {"gate_form": gate_form, "gate_bias_init": gate_bias_init, "bn_momentum": bn_momentum}
        given = {option: value for option, value in given.items() if value is not None} | (options or {})
        self.use(gsto_models.create_model(name, num_classes, "pose", pretrained=pretrained, **given))
        self.loss_weights, self.sigma, self.evaluation = loss_weights, sigma, evaluation
        self.poses: list[Pose] = []  # of the latest evaluation

    @property
    def headline(self) -> str:
        return f"val/AP_{self.evaluation.protocol('gt')}"

    def make_reports(self, folder: Path) -> list[Callback]:
        return [PoseReport(folder)]

    def make_evaluation_reports(self, folder: Path) -> list[Callback]:
        return [EvaluationReport(Path(self.evaluation.out or folder))]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage in ("fit", "validate"):
            evaluator_name()  # so that a run does not begin where it cannot be evaluated
        data = self.trainer.datamodule
        dataset = {"test": "test_set", "predict": "predict_set"}.get(stage, "val_set")
        self.evaluator = Evaluator(getattr(data, dataset), self.evaluation, self.sigma)

    def training_loss(self, batch: TrainSample) -> Tensor:
        images, joints, _ = batch
        return pose_loss(self(images), joints, self.loss_weights, self.sigma)

    def validation_step(self, batch: EvalSample, batch_idx: int) -> None:
        self.evaluator.update(self, batch.image, batch.index)

    def test_step(self, batch: EvalSample, batch_idx: int) -> None:
        self.evaluator.update(self, batch.image, batch.index)

    def predict_step(self, batch: EvalSample, batch_idx: int) -> Tensor:
        self.evaluator.update(self, batch.image, batch.index)
        return batch.index  # Lightning would warn of predictions that are None

    def on_validation_epoch_end(self) -> None:
        self.poses = self.evaluator.finish()
        data = self.trainer.datamodule
        figures = measure(data.val_annotations, self.poses, self.evaluation.protocol(data.evaluated_boxes))
        # equal in all processes: each has the poses of all
        self.log_dict({f"val/{name}": value for name, value in figures.items()}, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        self.poses = self.evaluator.finish()

    def on_predict_epoch_end(self) -> None:
        self.poses = self.evaluator.finish()
