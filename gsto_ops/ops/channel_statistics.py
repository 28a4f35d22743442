"""``gsto_ops::channel_statistics``: mean and biased variance of every channel from one read, the first half of a batch norm.

No gradient flows through them: ``batch_norm_sum``, which uses them, accounts for it.
"""

from torch import Tensor

from .. import reference
from .library import define


def _fake(input: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = (input.new_empty(input.shape[1], dtype=reference.statistics_dtype(input)) for _ in range(2))
    return mean, var


define(
    "channel_statistics",
    "channel_statistics",
    "forward",
    "(Tensor input) -> (Tensor mean, Tensor var)",
    reference.channel_statistics,
    _fake,
)
