"""What a run would take, before it is started: steps, images, memory, time. Nothing is computed, no GPU is needed."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

import gsto_models

from .data import TrainingData
from .task import TrainingTask

# GSTO-HRNet-W48, a step of 8 x 512x1024 with its loss, bf16 autocast, channels_last, replayed from a CUDA graph: 128 ms on one
# H200, which is 3 (forward, and backward twice that) x 2 x 1.916e11 multiply-adds x 8 images / 0.128 s = 72e12 per second
FLOPS_PER_SECOND = 72e12
_STATES = {"sgd": 1, "adam": 2, "adamw": 2}  # float32 numbers per weight that the optimizer keeps


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU between the passes of a step. Workspaces, gradients of activations and fragmentation come on top."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    Attributes:
        images: training images, and where that number comes from.
        batch: images at once, batches accumulated, processes.
        epochs, steps_per_epoch: its length.
        multiply_adds: of the network's forward pass for one image.
        size: (height, width) of that image.
        parameters: of the network.
        memory: per GPU.
    """

    images: tuple[int, str]
    batch: tuple[int, int, int]
    epochs: int
    steps_per_epoch: int
    multiply_adds: int
    size: tuple[int, int]
    parameters: int
    memory: Memory

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def step_images(self) -> int:
        return math.prod(self.batch)

    @property
    def seconds(self) -> float:
        flops = 3 * 2 * self.multiply_adds * self.step_images * self.steps
        return flops / (FLOPS_PER_SECOND * self.batch[2])

    def __str__(self) -> str:
        at_once, accumulated, processes = self.batch
        height, width = self.size
        parts = {"weights": self.memory.weights, "gradients": self.memory.gradients, "optimizer": self.memory.optimizer}
        parts["saved for the backward pass"] = self.memory.activations
        held = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        # weights, averages and optimizer's numbers, in last.ckpt, previous.ckpt and best.ckpt
        disk = 3 * (self.memory.weights + self.memory.optimizer) / 2**30
        rate = f"{FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s per GPU, measured with GSTO-HRNet-W48 on one H200"
        lines = [
            f"images   {self.images[0]:,} ({self.images[1]})",
            f"batch    {self.step_images} per step = {at_once} at once x {accumulated} accumulated x {processes} GPUs",
            f"length   {self.epochs} epochs x {self.steps_per_epoch:,} steps = {self.steps:,} steps, "
            f"{self.steps * self.step_images:,} images",
            f"network  {self.parameters:,} parameters, {self.multiply_adds / 1e9:.1f}e9 multiply-adds forward per image of "
            f"{height}x{width}",
            f"memory   at least {self.memory.total / 2**30:.1f} GiB per GPU = {held}",
            "         (counted: the tensors that a step holds between its passes. A peak on a GPU was 1.4 x the count:",
            "         HRNetV2-W48, 8 x 512x1024, bf16: 10.1 GiB by this count, 13.8 GiB measured on one H200)",
            f"time     about {self.seconds / 3600:.1f} hours without evaluations",
            f"         (estimated: 3 x the forward pass, at {rate};",
            "         smaller networks reach less, and so do loaders that cannot keep up: measure them)",
            f"disk     {disk:.1f} GiB for three checkpoints",
        ]
        return "\n".join(lines)


def make_plan(
    task: TrainingTask, data: TrainingData, *, epochs: int, batch: tuple[int, int, int], precision: str
) -> Plan:
    """Plan a run.

    Args:
        task, data: as they would be trained; they are not changed.
        epochs: length of the run.
        batch: images at once, batches accumulated, processes.
        precision: Lightning's, for example "bf16-mixed".
    """
    images = data.count_train_images()
    step_images = math.prod(batch)
    example = data.example_batch(1)
    size = tuple(example[0].shape[-2:])
    return Plan(
        images,
        batch,
        epochs,
        images[0] // step_images,
        gsto_models.complexity(task.network, size).macs_as_executed,
        size,
        sum(p.numel() for p in task.network.parameters()),
        count_memory(task, data.example_batch(batch[0]), precision),
    )


def count_memory(task: TrainingTask, batch: Any, precision: str) -> Memory:
    """Count what a training step holds, by running the forward pass and the loss on tensors without contents."""
    parameters = [p for p in task.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in task.parameters())
    saved: dict[StorageWeakRef, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(StorageWeakRef(tensor.untyped_storage()), tensor)
        return tensor

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        fake_task = copy.deepcopy(task).train()
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    autocast = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    with fake, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        fake_batch = tuple(fake.from_tensor(part) if isinstance(part, Tensor) else part for part in batch)
        fake_task.training_loss(fake_batch)
    own = {StorageWeakRef(tensor.untyped_storage()) for tensor in _tensors(fake_task)}
    for part in fake_batch:
        if isinstance(part, Tensor):
            keep(part)
    activations = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)
    trained = sum(p.numel() * p.element_size() for p in parameters)
    return Memory(weights, trained, _STATES[task.optimizer] * trained, activations)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
