"""Mean and variance of every channel."""

import torch
from torch import Tensor

from .parts import statistics_dtype


def channel_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of every channel over N, H, W."""
    var, mean = torch.var_mean(input.to(statistics_dtype(input)), (0, 2, 3), correction=0)
    return mean, var
