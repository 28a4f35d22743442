"""The exponential moving average of the weights."""

from __future__ import annotations

from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ExponentialMovingAverage(WeightAveraging):
    """Keeps averaged = decay * averaged + (1 - decay) * weights after every optimizer step, BatchNorm's statistics included.

    Evaluation uses the averages, and they are the weights in a checkpoint's `state_dict`; training goes on with its own.

    Args:
        decay: in (0, 1).

    Raises:
        ValueError: a decay outside (0, 1).
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, got {decay}")
        # the "multi" form updates all tensors of a kind in one kernel; the other one takes two per tensor
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))
