"""Batch norm in passes over memory: the statistics; normalise, resample, add, activate. The way back is in norm_backward.py.

Where all maps are dense, alike and channels_last, several pixels side by side make one of k C channels (``launch.folded``): then
any C has 16-byte accesses and full tiles. ``columns`` is k C, ``channels`` is C.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import Pixels, Resampling, Strides, ceil_div, folded, is_last, is_wide, launch
from .reduce import merge_statistics
from .taps import by_channel, by_pixel, indices, offsets, pixel_tile, relu, sum_pixels, tap, zeros

Maps = Sequence[Tensor]


def flat(maps: Sequence[Tensor | None]) -> tuple[int, Pixels, list[Strides | None]]:
    """(k, pixels, strides) of maps whose pixels are treated alike; None for absent ones."""
    fold, pixels = folded(*(m for m in maps if m is not None))
    found = iter(pixels.strides)
    return fold, pixels, [None if m is None else next(found) for m in maps]


def ranges(problem: configs.Problem, config: configs.Config, device: torch.device) -> tuple[int, int, int]:
    """(tiles per program, programs per block of columns, blocks) of a reduction over pixels."""
    tiles = problem.images * problem.height * ceil_div(problem.width, config.width)
    blocks = ceil_div(problem.channels, config.channels)
    per_split = max(1, ceil_div(tiles, configs.resident_splits(configs.target_of(device), blocks, tiles)))
    return per_split, ceil_div(tiles, per_split), blocks


FIRST = tl.constexpr(16)  # pixels whose mean is taken off before squares are added


# Traffic: x once (2 bytes per element of a 16-bit map); 16 bytes per column and program of partial statistics.
@triton.jit(do_not_specialize=["images", "height", "tiles_per_split"])
def channel_statistics_kernel(
    input,
    counts,
    means,
    squares,
    channels,
    columns,
    images,
    height,
    width,
    tiles_per_split,
    input_strides,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per range of pixel tiles: the count, the mean and the sum of squared differences from it.

    The sums are of differences from the mean of the range's first few pixels: its distance d from the mean of all n is a
    fraction of their deviation, or comes from an outlier, which adds more than d² to the sum that d² n is subtracted from: the
    rounding costs at most n units in the last place, whatever the mean.
    """
    blocks = tl.cdiv(columns, BLOCK_C)
    split = tl.program_id(0) // blocks
    c = indices(tl.program_id(0) % blocks * BLOCK_C, BLOCK_C, WIDE)
    tiles_w = tl.cdiv(width, BLOCK_P)
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, images * height * tiles_w)
    near = begin % tiles_w * BLOCK_P + indices(0, FIRST, WIDE)
    first = input + (begin // (tiles_w * height)).to(tl.int64) * input_strides[0]
    at = offsets(tl.zeros_like(near) + begin // tiles_w % height, near, c, input_strides, LAST)
    inside = by_pixel(near < width, LAST) & by_channel(c < columns, LAST)
    pivot = sum_pixels(tl.load(first + at, mask=inside, other=0.0).to(tl.float32), LAST)
    pivot /= tl.minimum(width - begin % tiles_w * BLOCK_P, FIRST).to(tl.float32)
    total = zeros(BLOCK_P, BLOCK_C, LAST)
    square = zeros(BLOCK_P, BLOCK_C, LAST)
    pixels = tl.zeros((BLOCK_P,), tl.float32)
    for tile in range(begin, end):
        image, h, w, valid = pixel_tile(tile, height, width, 1, BLOCK_P, WIDE)
        mask = by_pixel(valid, LAST) & by_channel(c < columns, LAST)
        x = tl.load(input + image * input_strides[0] + offsets(h, w, c, input_strides, LAST), mask=mask, other=0.0)
        difference = tl.where(mask, x.to(tl.float32) - by_channel(pivot, LAST), 0.0)
        total += difference
        square += difference * difference
        pixels += valid.to(tl.float32)
    count = tl.sum(pixels)
    mean = sum_pixels(total, LAST) / count
    at = split.to(tl.int64) * columns + c
    tl.store(means + at, pivot.to(tl.float64) + mean.to(tl.float64), mask=c < columns)
    spread = tl.maximum(sum_pixels(square, LAST) - count * mean * mean, 0.0)
    tl.store(squares + at, spread, mask=c < columns)
    tl.store(counts + at // channels, tl.zeros_like(mean) + count, mask=(c < columns) & (c % channels == 0))


def channel_statistics(input: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Mean and biased variance of every channel."""
    fold, pixels = folded(input)
    channels = input.shape[1]
    columns = fold * channels
    problem = configs.Problem(
        "channel_statistics", input.dtype, is_last(input), columns, columns, *pixels[:3], precision="ieee"
    )

    def run(config: configs.Config) -> tuple[Tensor, ...]:
        per_split, splits, blocks = ranges(problem, config, input.device)
        counts = torch.empty(splits * fold, dtype=torch.float32, device=input.device)
        means = torch.empty((splits * fold, channels), dtype=torch.float64, device=input.device)
        squares = torch.empty((splits * fold, channels), dtype=torch.float32, device=input.device)
        launch(
            channel_statistics_kernel,
            splits * blocks,
            input.device,
            input,
            counts,
            means,
            squares,
            channels,
            columns,
            pixels.images,
            pixels.height,
            pixels.width,
            per_split,
            *pixels.strides,
            LAST=problem.channels_last,
            WIDE=is_wide(input),
            BLOCK_P=config.width,
            BLOCK_C=config.channels,
            num_warps=config.num_warps,
        )
        return counts, means, squares

    merge_statistics(*configs.run(problem, input.device, run), mean, variance)


# Traffic: input, every term of the output's size and the output once: 2 (2 + T) bytes per element of 16-bit maps. Smaller terms
# come from DRAM once, and 4 times (bilinear) from L1/L2; the gate once per block of channels. Same maps in, no temporary out.
@triton.jit(do_not_specialize=["height", "rows"])
def batch_norm_sum_kernel(
    input,
    gate,
    terms,
    means,
    variances,
    weights,
    biases,
    eps,
    output,
    channels,
    columns,
    height,
    width,
    rows,
    cols,
    input_strides,
    gate_strides,
    output_strides,
    term_strides,
    SMALL: tl.constexpr,
    TERMS: tl.constexpr,
    NORM: tl.constexpr,
    MODE: tl.constexpr,
    ALIGN: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """output = act(gate input + sum of R_k norm_k(term_k)); R_k's rows add up to one, so the norm comes after it."""
    blocks = tl.cdiv(columns, BLOCK_C)
    image, h, w, valid = pixel_tile(tl.program_id(0) // blocks, height, width, BLOCK_H, BLOCK_W, WIDE)
    c = indices(tl.program_id(0) % blocks * BLOCK_C, BLOCK_C, WIDE)
    channel = c % channels
    mask = by_pixel(valid, LAST) & by_channel(c < columns, LAST)
    result = zeros(BLOCK_H * BLOCK_W, BLOCK_C, LAST)
    if input is not None:
        at = image * input_strides[0] + offsets(h, w, c, input_strides, LAST)
        result += tl.load(input + at, mask=mask, other=0.0).to(tl.float32)
        if gate is not None:
            at = image * gate_strides[0] + h * gate_strides[2] + w * gate_strides[3]
            result *= by_pixel(tl.load(gate + at, mask=valid, other=0.0).to(tl.float32), LAST)
    for k in tl.static_range(TERMS):
        term = terms[k] + image * term_strides[k][0]
        if SMALL[k]:
            value = zeros(BLOCK_H * BLOCK_W, BLOCK_C, LAST)
            for r in range(0, rows[k][4]):  # not unrolled: the addresses of all taps at once would spill
                y, weight_y = tap(h, r, rows[k], MODE, ALIGN)
                for s in tl.static_range(2 if MODE == "bilinear" else 1):
                    x, weight_x = tap(w, s, cols[k], MODE, ALIGN)
                    weight = weight_y * weight_x
                    needed = by_pixel(valid & (weight != 0), LAST) & by_channel(c < columns, LAST)
                    near = tl.load(term + offsets(y, x, c, term_strides[k], LAST), mask=needed, other=0.0)
                    value += by_pixel(weight, LAST) * near.to(tl.float32)
        else:
            value = tl.load(term + offsets(h, w, c, term_strides[k], LAST), mask=mask, other=0.0).to(tl.float32)
        if NORM:
            mean = tl.load(means[k] + channel)
            scale = tl.load(weights[k] + channel).to(tl.float32) * tl.rsqrt(tl.load(variances[k] + channel) + eps[k])
            shift = tl.load(biases[k] + channel).to(tl.float32)
            value = (value - by_channel(mean, LAST)) * by_channel(scale, LAST) + by_channel(shift, LAST)
        result += value
    if RELU:
        result = relu(result)
    at = image * output_strides[0] + offsets(h, w, c, output_strides, LAST)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=mask)


def normalised_sum(
    input: Tensor | None,
    gate: Tensor | None,
    terms: Maps,
    transfers: Sequence[Resampling],
    norms: Sequence[Maps],
    eps: Sequence[float],
    output: Tensor,
    *,
    relu: bool,
) -> None:
    """output = act(gate input + sum of R_k norm_k(term_k)); ``norms``: means, variances, weights, biases, or empty ones."""
    small = tuple(not r.identity for r in transfers)
    maps = (input, gate, output, *terms)
    fold, pixels, strides = flat(maps)
    if any(small):
        fold, pixels = 1, Pixels(output.shape[0], *output.shape[2:], [])
        strides = [None if m is None else m.stride() for m in maps]
    images, height, width, _ = pixels
    columns = fold * output.shape[1]
    name = "batch_norm_sum_gather" if any(small) else "batch_norm_sum"
    problem = configs.Problem(
        name, output.dtype, is_last(output), columns, columns, images, height, width, precision="ieee"
    )

    def run(config: configs.Config) -> None:
        tiles = images * ceil_div(height, config.height) * ceil_div(width, config.width)
        launch(
            batch_norm_sum_kernel,
            tiles * ceil_div(columns, config.channels),
            output.device,
            input,
            gate,
            tuple(terms),
            *(tuple(vectors) for vectors in norms),
            tuple(eps),
            output,
            output.shape[1],
            columns,
            height,
            width,
            tuple(r.rows for r in transfers),
            tuple(r.cols for r in transfers),
            *strides[:3],
            tuple(strides[3:]),
            SMALL=small,
            TERMS=len(terms),
            NORM=len(eps) > 0,
            MODE=next((r.mode for r in transfers if not r.identity), "identity"),
            ALIGN=any(r.align_corners for r in transfers),
            RELU=relu,
            LAST=problem.channels_last,
            WIDE=is_wide(*(m for m in maps if m is not None)),
            BLOCK_H=config.height,
            BLOCK_W=config.width,
            BLOCK_C=config.channels,
            num_warps=config.num_warps,
        )

    configs.run(problem, output.device, run)
