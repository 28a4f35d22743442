"""``update_running_statistics_`` in Triton: a program per norm."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit
def moved(running, batch, share):
    return (1.0 - share) * running + share * batch


# Traffic: a few hundred numbers; the launch is what it costs.
@triton.jit(do_not_specialize=["channels"])
def update_running_statistics_kernel(
    running_means,
    running_vars,
    batches,
    means,
    variances,
    unbiased,
    counts,
    momentum,
    channels,
    strides,
    NORMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A norm's buffers towards the batch's mean and variance * unbiased by momentum, or by 1 / number of batches.

    With ``counts`` the factor of the variance is n / (n - 1), n from there.
    """
    for k in tl.static_range(NORMS):
        if tl.program_id(0) == k:
            dtype = tl.float64 if running_means[k].dtype.element_ty == tl.float64 else tl.float32
            number = tl.load(batches[k]) + 1
            tl.store(batches[k], number)
            share = 1.0 / number.to(dtype) if momentum is None else momentum
            factor = unbiased[k]
            if counts is not None:
                n = tl.load(counts[k]).to(dtype)
                factor = n / (n - 1.0)
            for start in range(0, channels[k], BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                mask = c < channels[k]
                at = running_means[k] + c * strides[k][0]
                mean = moved(tl.load(at, mask=mask).to(dtype), tl.load(means[k] + c, mask=mask).to(dtype), share)
                tl.store(at, mean.to(at.dtype.element_ty), mask=mask)
                at = running_vars[k] + c * strides[k][1]
                batch = tl.load(variances[k] + c, mask=mask).to(dtype) * factor
                tl.store(at, moved(tl.load(at, mask=mask).to(dtype), batch, share).to(at.dtype.element_ty), mask=mask)


def forward(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    num_batches_tracked: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    pixels: Sequence[int],
    counts: Sequence[Tensor],
    momentum: float | None,
) -> None:
    first = 0
    for end in range(1, len(mean) + 1):
        # Programs run in any order: a norm that is there twice takes two launches.
        now = slice(first, end)
        if end < len(mean) and all(t is not num_batches_tracked[end] for t in num_batches_tracked[now]):
            continue
        first = end
        launch(
            update_running_statistics_kernel,
            len(mean[now]),
            mean[0].device,
            *(tuple(tensors[now]) for tensors in (running_mean, running_var, num_batches_tracked)),
            *(tuple(tensor.contiguous() for tensor in tensors[now]) for tensors in (mean, var)),
            tuple(n / max(1, n - 1) for n in pixels[now]),
            tuple(counts[now]) if counts else None,
            momentum,
            tuple(tensor.shape[0] for tensor in mean[now]),
            tuple((m.stride(0), v.stride(0)) for m, v in zip(running_mean[now], running_var[now], strict=True)),
            NORMS=len(mean[now]),
            BLOCK_C=128,
            num_warps=1,  # so that no thread reads a number of batches that another one has written
        )
