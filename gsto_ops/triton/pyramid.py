"""Pooling over windows too large for one program, as products: pooled = A x with A (bins, pixels) made of gates and windows.

The matrix A lives in registers only. All levels of a pyramid share one reading of x, and with a single level this is average
pooling down to a few pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import ceil_div, is_last, is_wide, launch, precision
from .taps import by_channel, by_pixel, indices, offsets, zeros

Levels = tuple[tuple[int, int], ...]  # (bins along H, bins along W) of every level


# Traffic: 20 bytes per bin.
@triton.jit(do_not_specialize=["bins", "height", "width", "levels"])
def windows_kernel(table, bins, height, width, levels, LEVELS: tl.constexpr, WIDE: tl.constexpr, BLOCK_B: tl.constexpr):
    """Rows of a table (5, bins): level, first and end row, first and end column of every bin's window."""
    b = indices(tl.program_id(0) * BLOCK_B, BLOCK_B, WIDE)
    first = 0
    for k in tl.static_range(LEVELS):
        bins_h = levels[k][0]
        bins_w = levels[k][1]
        row = (b - first) // bins_w
        col = (b - first) % bins_w
        inside = (b >= first) & (row < bins_h)
        tl.store(table + b, tl.zeros_like(b).to(tl.int32) + k, mask=inside)
        tl.store(table + bins + b, (row * height // bins_h).to(tl.int32), mask=inside)
        tl.store(table + 2 * bins + b, (((row + 1) * height + bins_h - 1) // bins_h).to(tl.int32), mask=inside)
        tl.store(table + 3 * bins + b, (col * width // bins_w).to(tl.int32), mask=inside)
        tl.store(table + 4 * bins + b, (((col + 1) * width + bins_w - 1) // bins_w).to(tl.int32), mask=inside)
        first += bins_h * bins_w


@triton.jit
def load_windows(table, b, bins):
    """(level, first row, end row, first column, end column) of bins; empty windows behind the last one."""
    level = tl.load(table + b, mask=b < bins, other=0).to(b.dtype)
    h0 = tl.load(table + bins + b, mask=b < bins, other=0).to(b.dtype)
    h1 = tl.load(table + 2 * bins + b, mask=b < bins, other=0).to(b.dtype)
    w0 = tl.load(table + 3 * bins + b, mask=b < bins, other=0).to(b.dtype)
    w1 = tl.load(table + 4 * bins + b, mask=b < bins, other=0).to(b.dtype)
    return level, h0, h1, w0, w1


@triton.jit
def inside_windows(h, w, valid, h0, h1, w0, w1, LAST: tl.constexpr):
    """Whether a pixel lies in a bin's window: [pixels, bins], or [bins, pixels]."""
    inside = by_pixel(valid, LAST) & (by_pixel(h, LAST) >= by_channel(h0, LAST))
    inside &= by_pixel(h, LAST) < by_channel(h1, LAST)
    inside &= by_pixel(w, LAST) >= by_channel(w0, LAST)
    return inside & (by_pixel(w, LAST) < by_channel(w1, LAST))


@triton.jit
def inverse_size(h0, h1, w0, w1):
    return 1.0 / tl.maximum((h1 - h0) * (w1 - w0), 1).to(tl.float32)


@triton.jit
def load_image(input, p, h, w, valid, c, channels, strides, FLAT: tl.constexpr, LAST: tl.constexpr):
    """A tile of an image; FLAT: its pixels are one axis, whose contiguity shows without division."""
    mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
    if FLAT:
        at = by_pixel(p * strides[3], LAST) + by_channel(c * strides[1], LAST)
    else:
        at = offsets(h, w, c, strides, LAST)
    return tl.load(input + at, mask=mask, other=0.0)


# Traffic: x once from DRAM where all bins fit one block (else once per block of bins whose rows hold the pixel), the gates once
# per block of channels, and splits * bins * C floats of partial sums.
@triton.jit(do_not_specialize=["images", "height", "bins", "splits"])
def pool_kernel(
    input,
    gate,
    sums,
    images,
    channels,
    height,
    width,
    bins,
    splits,
    windows,
    input_strides,
    LEVELS: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of g_k x over the windows: partial sums (splits, images, bins, C)."""
    blocks_b = tl.cdiv(bins, BLOCK_B)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    b = indices(program % blocks_b * BLOCK_B, BLOCK_B, WIDE)
    program = program // blocks_b
    c = indices(program % blocks_c * BLOCK_C, BLOCK_C, WIDE)
    program = program // blocks_c
    split = program % splits
    image = (program // splits).to(tl.int64)
    pixels = height * width
    input += image * input_strides[0]
    gate += image * LEVELS * pixels
    level, h0, h1, w0, w1 = load_windows(windows, b, bins)
    begin = tl.min(tl.where(b < bins, h0, height)) * width
    count = tl.max(h1) * width - begin
    per_split = tl.cdiv(tl.cdiv(count, splits), BLOCK_P) * BLOCK_P
    end = begin + tl.minimum((split + 1) * per_split, count)
    result = zeros(BLOCK_B, BLOCK_C, LAST)
    for start in range(begin + split * per_split, end, BLOCK_P):
        p = indices(start, BLOCK_P, WIDE)
        h = p // width
        w = p % width
        x = load_image(input, p, h, w, p < end, c, channels, input_strides, FLAT, LAST)
        # [bins, pixels], or [pixels, bins]: a gate where the pixel lies in the bin's window. Most bins cost no access.
        inside = inside_windows(h, w, p < end, h0, h1, w0, w1, not LAST)
        at = by_pixel(level * pixels, LAST) + by_channel(p, LAST)
        factor = tl.load(gate + at, mask=inside, other=0.0).to(x.dtype)
        if LAST:
            result = tl.dot(factor, x, result, input_precision=PRECISION)
        else:
            result = tl.dot(x, factor, result, input_precision=PRECISION)
    sums += (split.to(tl.int64) * images + image) * bins * channels
    mask = by_pixel(b < bins, LAST) & by_channel(c < channels, LAST)
    tl.store(sums + by_pixel(b * channels, LAST) + by_channel(c, LAST), result, mask=mask)


# Traffic: the partial sums once, dest once.
@triton.jit(do_not_specialize=["images", "channels", "bins", "splits"])
def pool_finish_kernel(
    sums,
    dest,
    images,
    channels,
    bins,
    splits,
    windows,
    dest_strides,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dest = the sums over the splits, over the windows' sizes."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    image = row // bins
    b = row % bins
    mask = (row < images * bins)[:, None] & (c < channels)[None, :]
    total = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for split in range(0, splits):
        at = (split * images * bins + row[:, None]) * channels + c[None, :]
        total += tl.load(sums + at, mask=mask, other=0.0)
    _level, h0, h1, w0, w1 = load_windows(windows, b, bins)
    total *= inverse_size(h0, h1, w0, w1)[:, None]
    at = (image * dest_strides[0] + b * dest_strides[2])[:, None] + (c * dest_strides[1])[None, :]
    tl.store(dest + at, total.to(dest.dtype.element_ty), mask=mask)


def _wide(levels: Levels, height: int, width: int) -> bool:
    """Whether products of bins and positions need 64 bits."""
    return any((h + 1) * (height + 1) >= 2**31 or (w + 1) * (width + 1) >= 2**31 for h, w in levels)


def windows_of(levels: Levels, height: int, width: int, device: torch.device) -> Tensor:
    """The table of :func:`windows_kernel`, made on the device: no copy from the host, which a CUDA graph could not hold."""
    bins = sum(h * w for h, w in levels)
    table = torch.empty((5, bins), dtype=torch.int32, device=device)
    constants = {"LEVELS": len(levels), "WIDE": _wide(levels, height, width), "BLOCK_B": 128, "num_warps": 4}
    launch(windows_kernel, ceil_div(bins, 128), device, table, bins, height, width, levels, **constants)
    return table


def pool(input: Tensor, gate: Tensor, windows: Tensor, dest: Tensor) -> None:
    """dest (N, C, bins) = adaptive average pooling of g_k x for all levels, bin after bin; gate is (N, K, H, W).

    ``windows``: see :func:`windows_of`.
    """
    images, channels, height, width = input.shape
    bins = dest.shape[2]
    wide = is_wide(input, gate) or bins * channels >= 2**31
    problem = configs.Problem(
        "pool", input.dtype, is_last(input), channels, bins, images, height, width, precision=precision()
    )
    # Of float32 with 64-bit offsets one stage: those of three take 1,344 bytes per thread more than there are.
    one_stage = wide and input.element_size() == 4

    def run(config: configs.Config) -> Tensor:
        blocks = images * ceil_div(bins, config.out_channels) * ceil_div(channels, config.channels)
        pixels = height * width
        target = configs.target_of(input.device)
        splits = configs.splits(target, blocks, ceil_div(pixels, config.width), config.width, images * bins * channels)
        sums = torch.empty((splits, images, bins, channels), dtype=torch.float32, device=input.device)
        launch(
            pool_kernel,
            blocks * splits,
            input.device,
            input,
            gate,
            sums,
            images,
            channels,
            height,
            width,
            bins,
            splits,
            windows,
            input.stride(),
            LEVELS=gate.shape[1],
            FLAT=input.stride(2) == width * input.stride(3),
            PRECISION=problem.precision,
            LAST=problem.channels_last,
            WIDE=wide,
            BLOCK_P=config.width,
            BLOCK_B=config.out_channels,
            BLOCK_C=config.channels,
            num_warps=config.num_warps,
            num_stages=1 if one_stage else config.num_stages,
        )
        return sums

    sums = configs.run(problem, input.device, run)
    launch(
        pool_finish_kernel,
        ceil_div(images * bins, 16) * ceil_div(channels, 64),
        input.device,
        sums,
        dest,
        images,
        channels,
        bins,
        sums.shape[0],
        windows,
        dest.stride(),
        BLOCK_B=16,
        BLOCK_C=64,
        num_warps=4,
    )
