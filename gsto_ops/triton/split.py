"""All that leaves one branch of a gated fusion, from one read: gates, gated projections with statistics, gated copies.

The way back is in split_backward.py. A tile holds all channels of its pixels where they fit (``SINGLE``), so that the gates are
known before anything is written.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import ceil_div, is_last, is_wide, launch, merged, precision
from .reduce import merge_statistics
from .taps import (
    by_channel,
    by_pixel,
    indices,
    load_matrix,
    multiply,
    offsets,
    pixel_tile,
    relu,
    sigmoid,
    sum_channels,
    sum_pixels,
    zeros,
)

Maps = Sequence[Tensor]


@triton.jit
def _add_logits(logits, x, gate_weight, c, channels, GATES: tl.constexpr, LAST: tl.constexpr):
    """The gates' logits with a block of channels more."""
    found = ()
    for k in tl.static_range(GATES):
        row = tl.load(gate_weight + k * channels + c, mask=c < channels, other=0.0).to(tl.float32)
        found += (logits[k] + sum_channels(x.to(tl.float32) * by_channel(row, LAST), LAST),)
    return found


# Traffic: x once from DRAM (its blocks of channels again from L1/L2 where a tile does not hold them all), every projection and
# gated copy written once, the gates once: 2 (1 + copies + rows / C) bytes per element of 16-bit maps; 2 R + 1 floats of
# statistics per tile of pixels for R rows of projections. W comes from L2, once per tile.
@triton.jit(do_not_specialize=["height"])
def gated_split_kernel(
    input,
    gate_weight,
    gate_bias,
    gate,
    weight,
    projected,
    gated,
    counts,
    means,
    squares,
    channels,
    split,
    out_channels,
    height,
    width,
    weight_strides,
    input_strides,
    gate_strides,
    projected_strides,
    gated_strides,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COPIES: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """gate_k = sigmoid(act(rho_k x + b_k)); for the first ones projected_k = gate_k W_k x with its statistics, then gate_k x."""
    tile = tl.program_id(0)
    image, h, w, valid = pixel_tile(tile, height, width, 1, BLOCK_P, WIDE)
    input += image * input_strides[0]
    logits = ()
    for _ in tl.static_range(GATES):
        logits += (tl.zeros((BLOCK_P,), tl.float32),)
    if SINGLE:
        c = indices(0, BLOCK_C, WIDE)
        mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
        x = tl.load(input + offsets(h, w, c, input_strides, LAST), mask=mask, other=0.0)
        logits = _add_logits(logits, x, gate_weight, c, channels, GATES, LAST)
    else:
        for c0 in range(0, channels, BLOCK_C):
            c = indices(c0, BLOCK_C, WIDE)
            mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
            x = tl.load(input + offsets(h, w, c, input_strides, LAST), mask=mask, other=0.0)
            logits = _add_logits(logits, x, gate_weight, c, channels, GATES, LAST)
    first = 0
    for k in tl.static_range(GATES):
        logit = logits[k]
        if gate_bias is not None:
            logit += tl.load(gate_bias + k).to(tl.float32)
        if RELU:
            logit = relu(logit)
        g = sigmoid(logit)
        at = image * gate_strides[0] + k * gate_strides[1] + h * gate_strides[2] + w * gate_strides[3]
        tl.store(gate + at, g.to(gate.dtype.element_ty), mask=valid)
        if k < GROUPS:
            dest = projected[k] + image * projected_strides[k][0]
            for n0 in range(0, split[k], BLOCK_N):
                n = indices(n0, BLOCK_N, WIDE)
                rows = weight + first * weight_strides[0]
                result = zeros(BLOCK_P, BLOCK_N, LAST)
                if SINGLE:
                    matrix = load_matrix(rows, c, n, channels, split[k], weight_strides[1], weight_strides[0], LAST)
                    result = multiply(x, matrix, result, LAST, PRECISION)
                else:
                    for c0 in range(0, channels, BLOCK_C):
                        ci = indices(c0, BLOCK_C, WIDE)
                        part = by_pixel(valid, LAST) & by_channel(ci < channels, LAST)
                        xi = tl.load(input + offsets(h, w, ci, input_strides, LAST), mask=part, other=0.0)
                        matrix = load_matrix(
                            rows, ci, n, channels, split[k], weight_strides[1], weight_strides[0], LAST
                        )
                        result = multiply(xi, matrix, result, LAST, PRECISION)
                inside = by_pixel(valid, LAST) & by_channel(n < split[k], LAST)
                rounded = (result * by_pixel(g, LAST)).to(dest.dtype.element_ty)
                tl.store(dest + offsets(h, w, n, projected_strides[k], LAST), rounded, mask=inside)
                count = tl.sum(valid.to(tl.float32))
                value = tl.where(inside, rounded.to(tl.float32), 0.0)
                mean = sum_pixels(value, LAST) / count
                difference = tl.where(inside, value - by_channel(mean, LAST), 0.0)
                tl.store(counts + tile, count)
                place = tile.to(tl.int64) * out_channels + first + n
                tl.store(means + place, mean, mask=n < split[k])
                tl.store(squares + place, sum_pixels(difference * difference, LAST), mask=n < split[k])
            first += split[k]
        elif k < GROUPS + COPIES:
            copy_strides = gated_strides[k - GROUPS]
            dest = gated[k - GROUPS] + image * copy_strides[0]
            if SINGLE:
                value = (x.to(tl.float32) * by_pixel(g, LAST)).to(dest.dtype.element_ty)
                tl.store(dest + offsets(h, w, c, copy_strides, LAST), value, mask=mask)
            else:
                for c0 in range(0, channels, BLOCK_C):
                    ci = indices(c0, BLOCK_C, WIDE)
                    part = by_pixel(valid, LAST) & by_channel(ci < channels, LAST)
                    xi = tl.load(input + offsets(h, w, ci, input_strides, LAST), mask=part, other=0.0)
                    value = (xi.to(tl.float32) * by_pixel(g, LAST)).to(dest.dtype.element_ty)
                    tl.store(dest + offsets(h, w, ci, copy_strides, LAST), value, mask=part)


def split_branch(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    gate: Tensor,
    projected: Maps,
    gated: Maps,
    statistics: tuple[Tensor, Tensor],
    *,
    relu: bool,
) -> None:
    """Fills gate, projected (with its mean and variance over all of them) and gated from one read of the input."""
    channels, out_channels = input.shape[1], sum(z.shape[1] for z in projected)
    pixels = merged(input, gate, *projected, *gated)
    widest = max((z.shape[1] for z in projected), default=1)
    name = "gated_split_copies" if weight is None else "gated_split"
    wide = is_wide(input, gate, *projected, *gated)
    # Of three copies in channels_last 40 - 104 bytes per thread do not fit with 128 pixels.
    tight = wide or (is_last(input) and weight is None and len(gated) > 2)
    problem = configs.Problem(
        name, input.dtype, is_last(input), channels, widest, *pixels[:3], precision=precision(), tight=tight
    )

    def run(config: configs.Config) -> tuple[Tensor, ...]:
        tiles = pixels.images * pixels.height * ceil_div(pixels.width, config.width)
        counts = torch.empty(tiles, dtype=torch.float32, device=input.device)
        means, squares = torch.empty((2, tiles, out_channels), dtype=torch.float32, device=input.device)
        launch(
            gated_split_kernel,
            tiles,
            input.device,
            input,
            gate_weight,
            gate_bias,
            gate,
            weight,
            tuple(projected),
            tuple(gated),
            counts,
            means,
            squares,
            channels,
            tuple(z.shape[1] for z in projected),
            out_channels,
            pixels.height,
            pixels.width,
            None if weight is None else weight.stride()[:2],
            *pixels.strides[:2],
            tuple(pixels.strides[2 : 2 + len(projected)]),
            tuple(pixels.strides[2 + len(projected) :]),
            GATES=gate.shape[1],
            GROUPS=len(projected),
            COPIES=len(gated),
            RELU=relu,
            PRECISION=problem.precision,
            LAST=problem.channels_last,
            WIDE=wide,
            SINGLE=config.channels >= channels,
            BLOCK_P=config.width,
            BLOCK_N=config.out_channels,
            BLOCK_C=config.channels,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return counts, means, squares

    partial = configs.run(problem, input.device, run)
    if projected:
        merge_statistics(*partial, *statistics)
