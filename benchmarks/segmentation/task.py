"""The Lightning task that trains and evaluates a segmentation network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

import gsto_models
import gsto_ops

from .metrics import class_iou, summarize
from .transforms import IGNORE

Batch = tuple[Tensor, Tensor, Sequence[str]]


def poly_factor(step: int, total_steps: int, power: float) -> float:
    """The learning rate's factor at a step: (1 - step / total_steps) ** power, a function of the step index alone."""
    return (1 - min(step, total_steps) / total_steps) ** power


def segmentation_loss(
    outputs: Sequence[Tensor], labels: Tensor, weights: Sequence[float], class_weights: Tensor | None = None
) -> Tensor:
    """Weighted sum of the outputs' cross-entropies, each upsampled bilinearly to the label's size (paper, Section 4.1).

    Args:
        outputs: logit maps (N, C, h, w), the main one first.
        labels: (N, H, W) int64, 255 = ignored.
        weights: one factor per output; further ones are left unused (the plain network has only the main output).

        class_weights: (C,) float32, or None for equal weights. The loss is the weighted mean over the labelled pixels.

    Returns:
        A float32 scalar; 0 when every pixel is ignored.

    Raises:
        ValueError: fewer weights than outputs.
    """
    if len(weights) < len(outputs):
        raise ValueError(f"loss_weights must have a factor for each of the {len(outputs)} outputs, got {list(weights)}")
    total = torch.zeros((), device=labels.device)
    mass = (labels != IGNORE).float()
    if class_weights is not None:
        mass = mass * class_weights[labels.where(labels != IGNORE, 0)]
    mass = mass.sum().clamp(min=1e-6)  # no labelled pixel: 0 / 1e-6 = 0 instead of 0 / 0
    with torch.autocast(labels.device.type, enabled=False):
        for logits, weight in zip(outputs, weights, strict=False):
            logits = gsto_ops.scale_transfer(logits.float(), size=labels.shape[-2:])
            loss = F.cross_entropy(logits, labels, class_weights, ignore_index=IGNORE, reduction="sum") / mass
            total = total + weight * loss
    return total


class SegmentationTask(LightningModule):
    """Trains a network of `gsto_models` by SGD (or AdamW) with poly decay, and evaluates it by one confusion matrix over the set.

    Args:
        num_classes: number of classes.
        name: a network of `gsto_models.list_models()`.
        gate_form: "paper" or "released"; None for the network's default. See `gsto_models.create_model`.
        gate_bias_init: None for gates without bias as in the paper; 4.0 starts with open gates, best from scratch.
        gated_fusion: overrides the network's default of having gates in its fusions.
        gated_transition: overrides the stages (of 2 and 3) after which the network has a gated transition.
        bn_momentum: BatchNorm momentum; None for the network's default, 0.01. Short runs need more.
        loss_weights: weights of the main output and of the auxiliary ones, in HRNets those after stages 3, 2 and 1.
        class_weights: weights of the classes in the loss, one positive number for each; None for equal weights.
        optimizer: "sgd" as in the paper, or "adamw", which learns rare classes within fewer steps.
        lr: initial learning rate.
        momentum: momentum of SGD.
        weight_decay: weight decay, for all parameters alike.
        poly_power: exponent of the learning rate's decay over the steps.
        channels_last: run the network on channels-last tensors.
        options: further options of `gsto_models.create_model`, for example {output_stride: 16, gate: supervised}.

    Metrics: `train/loss`, `train/lr`; `val/mIoU_ss`, `val/mIoU_ss_absent_as_zero`, `val/pixel_acc`, `val/mean_acc`.

    Raises:
        ValueError: a learning rate or poly power that is not positive; what `create_model` rejects.
        FloatingPointError: while training, when the loss is not finite.
    """

    def __init__(
        self,
        num_classes: int,
        name: str = "gsto_hrnet_w18_small_v2",
        gate_form: Literal["paper", "released"] | None = None,
        gate_bias_init: float | None = None,
        gated_fusion: bool | None = None,
        gated_transition: list[int] | None = None,
        bn_momentum: float | None = None,
        loss_weights: list[float] = [1.0, 0.5, 0.3, 0.2],  # noqa: B006 - jsonargparse reads the default; it is never changed
        class_weights: list[float] | None = None,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        poly_power: float = 0.9,
        channels_last: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for argument, value in (("lr", lr), ("poly_power", poly_power)):
            if not value > 0:
                raise ValueError(f"{argument} must be > 0, got {value}")
        if optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {optimizer!r}")
        self.save_hyperparameters()
        if class_weights is not None and (len(class_weights) != num_classes or min(class_weights) <= 0):
            raise ValueError(f"class_weights must be {num_classes} numbers > 0, got {class_weights}")
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        given = {
            "gate_form": gate_form,
            "gate_bias_init": gate_bias_init,
            "gated_fusion": gated_fusion,
            "gated_transition": None if gated_transition is None else tuple(gated_transition),
            "bn_momentum": bn_momentum,
        }
        given = {option: value for option, value in given.items() if value is not None} | (options or {})
        network = gsto_models.create_model(name, num_classes=num_classes, **given)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)
        self.val_class_iou: list[float] = []  # of the latest evaluation; NaN for an absent class

    def setup(self, stage: str) -> None:
        """BatchNorm is synchronised where several GPUs train together, and nowhere else."""
        if stage == "fit" and self.trainer.world_size > 1 and self.trainer.strategy.root_device.type == "cuda":
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        options = self.hparams
        if options.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=options.lr, weight_decay=options.weight_decay)
        return torch.optim.SGD(
            self.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        return self.network(images.contiguous(memory_format=self.memory_format))

    def on_train_start(self) -> None:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("the learning rate decays over the whole run: trainer.max_epochs or max_steps must be set")
        self.total_steps = int(total)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Set here instead of by a scheduler: a scheduler's saved state would bring the old rate back into a resumed run.
        factor = poly_factor(self.global_step, self.total_steps, self.hparams.poly_power)
        for group in self.optimizers().param_groups:
            group["lr"] = self.hparams.lr * factor

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels, names = batch
        loss = segmentation_loss(self(images), labels, self.hparams.loss_weights, self.class_weights)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.global_step}, batch {batch_idx} ({', '.join(names)}); "
                "a lower model.lr or gradient clipping (trainer.gradient_clip_val) may help"
            )
        rate = self.optimizers().param_groups[0]["lr"]
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        self.log("train/lr", rate, batch_size=len(images))
        return loss

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
