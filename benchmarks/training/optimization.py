"""Optimizers and learning rates. A rate is a function of the step (or epoch) index alone, never of a scheduler's state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("poly", "multistep")


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    """One parameter group, as the protocols have it.

    Args:
        name: one of `OPTIMIZERS`.
        parameters: all of them: BatchNorm's weights and biases decay like the others.
        lr, weight_decay: of the optimizer.
        momentum: of SGD; Adam has its own defaults.
        fused: one kernel for all parameters (CPU and CUDA have it) instead of one per operation.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, fused=fused)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, lr, weight_decay=weight_decay, fused=fused)


def poly_factor(step: int, total_steps: int, power: float) -> float:
    """The learning rate's factor at a step: (1 - step / total_steps) ** power."""
    return (1 - min(step, total_steps) / total_steps) ** power


def multistep_factor(epoch: int, milestones: Sequence[int], gamma: float) -> float:
    """The learning rate's factor in an epoch: `gamma` to the power of the milestones (epoch indices) reached."""
    return gamma ** sum(epoch >= milestone for milestone in milestones)
