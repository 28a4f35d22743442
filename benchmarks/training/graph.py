"""Forward pass, loss and backward pass of a training step as CUDA graphs: one launch each in place of thousands.

The optimizer stays outside: fused, it is a few launches. Not run on a GPU yet: `pytest -m gpu` compares a graphed run with a
plain one.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from ..errors import TrainingError, UsageError


def check_cuda_graph(trainer: Trainer, compiled: bool) -> None:
    """Whether a run can use CUDA graphs.

    Raises:
        UsageError: it cannot; the message says why.
    """
    device = trainer.strategy.root_device
    if device.type != "cuda":
        raise UsageError(f"model.cuda_graph needs an NVIDIA GPU, but this run is on {device}")
    if compiled:
        raise UsageError("model.cuda_graph and model.compile exclude each other: give only one of them")
    if trainer.world_size > 1:
        raise UsageError(f"model.cuda_graph is for one process, but this run has {trainer.world_size}")
    if trainer.accumulate_grad_batches > 1:
        raise UsageError(
            "model.cuda_graph writes a step's gradients to one place, so that they cannot be accumulated over "
            f"{trainer.accumulate_grad_batches} batches: set data.batch_size to the global batch size"
        )


class GraphedLoss:
    """The task's loss of a batch, captured with its gradients at the first call and replayed from then on.

    Raises:
        TrainingError: a later batch has another shape than the first.
    """

    def __init__(self, task: LightningModule) -> None:
        self._loss = _Loss(task)
        self._shapes: list[tuple[int, ...]] | None = None

    def __call__(self, batch: Any) -> Tensor:
        tensors = [part for part in batch if isinstance(part, Tensor)]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if self._shapes is None:
            self._capture(tensors)
            self._shapes = shapes
        elif shapes != self._shapes:
            raise TrainingError(f"model.cuda_graph needs batches of one shape, got {shapes} after {self._shapes}")
        return self._loss(*tensors).clone()  # the graph writes every loss to one place, and reports keep losses

    def _capture(self, tensors: list[Tensor]) -> None:
        # The capture runs the step a few times: BatchNorm's statistics must not see that. And it keeps its arguments as the
        # place that later batches are copied to, which must not be the first batch itself.
        before = [buffer.clone() for buffer in self._loss.buffers()]
        torch.cuda.make_graphed_callables(
            self._loss, tuple(tensor.clone() for tensor in tensors), allow_unused_input=True
        )
        with torch.no_grad():
            for buffer, value in zip(self._loss.buffers(), before, strict=True):
                buffer.copy_(value)


class _Loss(nn.Module):
    """A module with the task's network, so that a capture finds its parameters, but not the task, which has hooks."""

    def __init__(self, task: LightningModule) -> None:
        super().__init__()
        self.network = task.network
        self._call = task.training_loss

    def forward(self, *tensors: Tensor) -> Tensor:
        return self._call((*tensors, []))
