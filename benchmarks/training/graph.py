"""A whole training step as one CUDA graph: forward pass, loss, backward pass, clipping and optimizer are one launch.

What changes from step to step lies in tensors that the graph reads: the batch, the learning rate (a tensor in the optimizer's
group, on the GPU) and the optimizer's step counts (`capturable`). Not run on a GPU yet: `pytest -m gpu` compares a graphed run
with a plain one.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ..errors import TrainingError, UsageError
from ..kernels.gpu import captured


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
            "model.cuda_graph replays an optimizer step with every batch, so that gradients cannot be accumulated over "
            f"{trainer.accumulate_grad_batches} batches: set data.batch_size to the global batch size"
        )
    if trainer.precision == "16-mixed":
        raise UsageError(
            "model.cuda_graph cannot skip the steps whose gradients float16 does not hold: set trainer.precision to bf16-mixed"
        )


class GraphedStep:
    """A task's training step, captured at the first batch and replayed from then on.

    Args:
        task: its network is trained, its `training_loss` is minimised.
        optimizer: fused and capturable, its learning rates tensors.
        clip: gradients are clipped to it, None: they are not. clip_by: "norm", of all gradients together, or "value".

    Raises:
        TrainingError: a later batch has another shape than the first.
    """

    def __init__(
        self, task: LightningModule, optimizer: torch.optim.Optimizer, clip: float | None = None, clip_by: str = "norm"
    ) -> None:
        self._task, self._optimizer, self._clip, self._clip_by = task, optimizer, clip, clip_by
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._inputs: list[Tensor] = []
        self._loss = torch.empty(0)
        self._replay: Any = None

    def __call__(self, batch: Any) -> Tensor:
        """One step; its loss."""
        tensors = [part for part in batch if isinstance(part, Tensor)]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if self._replay is None:
            self._inputs = [tensor.clone() for tensor in tensors]
            self._replay = self._capture()
        before = [tuple(tensor.shape) for tensor in self._inputs]
        if shapes != before:
            raise TrainingError(f"model.cuda_graph needs batches of one shape, got {shapes} after {before}")
        for place, tensor in zip(self._inputs, tensors, strict=True):
            place.copy_(tensor)
        self._replay()
        return self._loss.clone()  # the graph writes every loss to one place, and reports keep losses

    def _step(self) -> None:
        device = self._inputs[0].device.type
        self._optimizer.zero_grad(set_to_none=True)  # so that the graph writes gradients instead of adding to them
        # Weights that autocast has cast and kept before the capture would stay as they are for ever.
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            loss = self._task.training_loss((*self._inputs, []))
        with torch.autocast(device, enabled=False):
            loss.backward()
            if self._clip is not None and self._clip_by == "norm":
                clip_grad_norm_(self._parameters, self._clip)
            elif self._clip is not None:
                clip_grad_value_(self._parameters, self._clip)
            self._optimizer.step()
        self._loss = loss.detach()

    def _capture(self) -> Any:
        """A function that replays the step. The capture runs it a few times, of which nothing must stay."""
        tensors = {id(t): t for t in [*self._parameters, *self._task.buffers(), *_tensors_of(self._optimizer)]}
        before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        devices = [tensor.device for tensor in self._inputs[:1] if tensor.is_cuda]
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*without CUDA graph capture")  # the runs before it
            replay = captured(self._step)
        with torch.no_grad():
            for key, tensor in tensors.items():
                tensor.copy_(before[key])
            for tensor in _tensors_of(self._optimizer):
                if id(tensor) not in tensors:
                    tensor.zero_()  # the state that the first step makes starts from zeros in all of our optimizers
        return replay


def _tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def prepare_optimizer(optimizer: torch.optim.Optimizer, graphed: bool, fused: bool, device: torch.device) -> None:
    """Make an optimizer fit for a `GraphedStep` or for plain steps. Its state may come from a checkpoint of either.

    Args:
        optimizer: with a state or without. graphed: which of the two. fused: as in `make_optimizer`. device: of its parameters.
    """
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if graphed else rate
        group["fused"] = fused
        if "capturable" in group:
            group["capturable"] = graphed
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:  # of Adam: counted where its other tensors are, if one kernel or a graph takes them all
                state["step"] = state["step"].to(device if fused else "cpu")
