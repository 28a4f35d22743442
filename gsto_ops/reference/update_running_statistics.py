"""Running statistics of batch norms, as ``nn.BatchNorm2d`` keeps them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def update_running_statistics_(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    num_batches_tracked: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    pixels: Sequence[int],
    counts: Sequence[Tensor],
    momentum: float | None,
) -> None:
    """What norms in training mode do to their buffers, one after the other: a norm may be there twice.

    ``var`` is biased, over ``pixels`` numbers per channel; with ``counts`` (tensors without dimensions), over so many.
    ``momentum`` None: the buffers become the averages over all batches.
    """
    for k, (m, v) in enumerate(zip(mean, var, strict=True)):
        n = counts[k] if counts else pixels[k]
        num_batches_tracked[k].add_(1)
        for running, batch in ((running_mean[k], m), (running_var[k], v * (n / (n - 1)))):
            # A sum in bfloat16 would round the batch's value before it is weighted.
            dtype = torch.promote_types(running.dtype, batch.dtype)
            share = 1.0 / num_batches_tracked[k].to(dtype) if momentum is None else momentum
            running.copy_(torch.lerp(running.to(dtype), batch.to(dtype), share))
