"""What the Lightning tasks share: optimizer, learning rate, randomness, layout, compilation, and a watch on the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from ..sampling import run_seed
from .graph import GraphedStep, check_cuda_graph, prepare_optimizer
from .loss_watch import LossWatch
from .optimization import OPTIMIZERS, SCHEDULES, make_optimizer, multistep_factor, poly_factor


class TrainingTask(LightningModule, ABC):
    """A network and how it is trained. Subclasses hand over the network (`use`), the loss and the evaluation.

    A batch is a tuple that starts with the images (N, 3, H, W) and ends with the N samples' names.

    Args:
        optimizer: "sgd" as in the segmentation protocols, "adam" as for pose, or "adamw".
        lr: learning rate at the start.
        momentum: of SGD.
        weight_decay: for all parameters alike.
        schedule: "poly": lr * (1 - step / steps) ** poly_power; "multistep": lr * gamma at each milestone reached.
        poly_power: exponent of "poly".
        milestones: epochs of "multistep".
        gamma: factor of "multistep".
        channels_last: run the network on channels-last tensors.
        compile: run the network through torch.compile.
        cuda_graph: replay the whole step, the optimizer's too, as one CUDA graph; for one GPU, without accumulation. Not run on
            a GPU yet.

    Attributes:
        headline: name of the metric, the higher the better, that chooses best.ckpt.

    Metrics: `train/loss`, `train/lr`.

    Raises:
        ValueError: an optimizer or schedule that does not exist, a learning rate, poly power or gamma that is not positive.
        TrainingError: while training, when the loss is not finite.
    """

    headline: str
    network: nn.Module

    def __init__(
        self,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Literal["poly", "multistep"] = "poly",
        poly_power: float = 0.9,
        milestones: list[int] = [],  # noqa: B006 - jsonargparse reads the default; it is never changed
        gamma: float = 0.1,
        channels_last: bool = False,
        compile: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        for argument, value in (("lr", lr), ("poly_power", poly_power), ("gamma", gamma)):
            if not value > 0:
                raise ValueError(f"{argument} must be > 0, got {value}")
        for argument, chosen, allowed in (("optimizer", optimizer, OPTIMIZERS), ("schedule", schedule, SCHEDULES)):
            if chosen not in allowed:
                raise ValueError(f"{argument} must be one of {allowed}, got {chosen!r}")
        self.optimization = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self.optimizer, self.schedule, self.poly_power = optimizer, schedule, poly_power
        self.milestones, self.gamma = milestones, gamma
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.compile_network, self.cuda_graph = compile, cuda_graph

    def use(self, network: nn.Module) -> None:
        """Take the network that is trained."""
        self.network = network.to(memory_format=self.memory_format)

    @abstractmethod
    def training_loss(self, batch: Any) -> Tensor:
        """The float32 scalar to minimise."""

    @abstractmethod
    def make_reports(self, folder: Path) -> list[Callback]:
        """What writes the run's results into its folder."""

    def make_evaluation_reports(self, folder: Path) -> list[Callback]:
        """What writes the results of `gsto validate`, `gsto test` and `gsto predict` into a folder of their own."""
        return []

    def forward(self, images: Tensor) -> Any:
        return self.network(images.contiguous(memory_format=self.memory_format))

    def setup(self, stage: str) -> None:
        """BatchNorm is synchronised where several GPUs train together, and nowhere else."""
        if stage != "fit":
            return
        if self.trainer.world_size > 1 and self.trainer.strategy.root_device.type == "cuda":
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        if self.cuda_graph:
            check_cuda_graph(self.trainer, self.compile_network)
        if self.compile_network:
            self.network.compile()  # in place, so that the names in checkpoints stay

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.optimizer, self.parameters(), **self.optimization, fused=self.fused_optimizer())

    def fused_optimizer(self) -> bool:
        """Whether one kernel updates all parameters; Lightning cannot clip gradients for that under mixed precision."""
        return self.cuda_graph or not self.trainer.gradient_clip_val

    def on_train_start(self) -> None:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("the learning rate decays over the whole run: trainer.max_epochs or max_steps must be set")
        self.total_steps = int(total)
        (optimizer,) = self.trainer.optimizers
        prepare_optimizer(optimizer, self.cuda_graph, self.fused_optimizer(), self.device)
        self.step_loss: Callable[[Any], Tensor] = self.training_loss
        if self.cuda_graph:
            clip_by = str(self.trainer.gradient_clip_algorithm or "norm")
            self.step_loss = GraphedStep(self, optimizer, self.trainer.gradient_clip_val, clip_by)
        self.loss_watch = LossWatch(Path(self.trainer.default_root_dir), self.global_rank)

    def learning_rate(self) -> float:
        """The learning rate of this step."""
        if self.schedule == "poly":
            factor = poly_factor(self.global_step, self.total_steps, self.poly_power)
        else:
            factor = multistep_factor(self.current_epoch, self.milestones, self.gamma)
        return self.optimization["lr"] * factor

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Both are set here, as functions of the place in the run, and not kept from step to step: so a resumed run has the
        # randomness (dropout) that it would have had, on any number of ranks, and no old rate comes back with a scheduler.
        place = (run_seed(), self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
        for group in self.optimizers().param_groups:
            if self.cuda_graph:
                group["lr"].fill_(self.learning_rate())
            else:
                group["lr"] = self.learning_rate()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.step_loss(batch)
        self.loss_watch.put(loss.detach(), batch, self.global_step, batch_idx)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch[0]))
        # a tensor, since Lightning copies numbers to the GPU, and such a copy waits until all its work is done
        rate = torch.tensor(self.learning_rate())
        self.log("train/lr", rate, batch_size=len(batch[0]))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self.cuda_graph:  # where it is part of the graph
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.cuda_graph:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_train_end(self) -> None:
        self.loss_watch.check()
