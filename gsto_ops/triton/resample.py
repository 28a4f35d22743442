"""Resampling as a gather, forward and transposed, with the gate, the affine and the activation on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import Axis, Resampling, ceil_div, is_last, is_wide, launch, merged
from .reduce import sum_rows
from .taps import (
    by_channel,
    by_pixel,
    first_reader,
    indices,
    offsets,
    pixel_tile,
    reader_weight,
    relu,
    sum_pixels,
    tap,
    zeros,
)


# Traffic: the source once from DRAM (the overlap of neighbouring outputs' taps comes from L1/L2), dest once, the gate once per
# block of channels.
@triton.jit(do_not_specialize=["rows"])
def resample_kernel(
    source,
    gate,
    scale,
    shift,
    dest,
    channels,
    rows,
    cols,
    source_strides,
    dest_strides,
    MODE: tl.constexpr,
    ALIGN: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dest = R act(scale * (gate * source) + shift); every operand of it is optional."""
    blocks = tl.cdiv(channels, BLOCK_C)
    image, h, w, valid = pixel_tile(tl.program_id(0) // blocks, rows[1], cols[1], BLOCK_H, BLOCK_W, WIDE)
    c = indices(tl.program_id(0) % blocks * BLOCK_C, BLOCK_C, WIDE)
    source += image * source_strides[0]
    if gate is not None:
        gate += image * rows[0] * cols[0]
    if scale is not None:
        factor = by_channel(tl.load(scale + c, mask=c < channels, other=0.0), LAST)
        term = by_channel(tl.load(shift + c, mask=c < channels, other=0.0), LAST)
    result = zeros(BLOCK_H * BLOCK_W, BLOCK_C, LAST)
    for r in range(0, rows[4]):
        y, weight_y = tap(h, r, rows, MODE, ALIGN)
        for s0 in range(0, cols[4], UNROLL):
            for s in tl.static_range(UNROLL):
                x, weight_x = tap(w, s0 + s, cols, MODE, ALIGN)
                weight = weight_y * weight_x
                needed = valid & (weight != 0)
                mask = by_pixel(needed, LAST) & by_channel(c < channels, LAST)
                value = tl.load(source + offsets(y, x, c, source_strides, LAST), mask=mask, other=0.0).to(tl.float32)
                if gate is not None:
                    g = tl.load(gate + y * cols[0] + x, mask=needed, other=0.0).to(tl.float32)
                    value *= by_pixel(g, LAST)
                if scale is not None:
                    value = value * factor + term
                if RELU:
                    value = relu(value)
                result += by_pixel(weight, LAST) * value
    dest += image * dest_strides[0]
    mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
    tl.store(dest + offsets(h, w, c, dest_strides, LAST), result.to(dest.dtype.element_ty), mask=mask)


# Traffic: the source once (overlap from L1/L2), dest once, the map before the activation once where given, and 2 C floats (with a
# norm C) per tile of sums, written and read.
@triton.jit(do_not_specialize=["rows"])
def resample_transposed_kernel(
    source,
    before,
    norm,
    scale,
    shift,
    dest,
    sums,
    channels,
    rows,
    cols,
    source_strides,
    before_strides,
    dest_strides,
    MODE: tl.constexpr,
    ALIGN: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dest = scale * m, m = [act passes at scale * before + shift] R^T source; per tile the sums of m * before and of m.

    With a norm (mean, variance, eps) only the sums of m * (before - mean) / sqrt(variance + eps).
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0) // blocks
    image, h, w, valid = pixel_tile(tile, rows[0], cols[0], BLOCK_H, BLOCK_W, WIDE)
    c = indices(tl.program_id(0) % blocks * BLOCK_C, BLOCK_C, WIDE)
    source += image * source_strides[0]
    first_y = first_reader(h, rows, MODE, ALIGN)
    first_x = first_reader(w, cols, MODE, ALIGN)
    result = zeros(BLOCK_H * BLOCK_W, BLOCK_C, LAST)
    for r in range(0, rows[4]):
        weight_y = reader_weight(first_y + r, h, rows, MODE, ALIGN)
        for s0 in range(0, cols[4], UNROLL):
            for s in tl.static_range(UNROLL):
                x = first_x + s0 + s
                weight = weight_y * reader_weight(x, w, cols, MODE, ALIGN)
                mask = by_pixel(valid & (weight != 0), LAST) & by_channel(c < channels, LAST)
                value = tl.load(source + offsets(first_y + r, x, c, source_strides, LAST), mask=mask, other=0.0)
                result += by_pixel(weight, LAST) * value.to(tl.float32)
    mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
    if before is not None:
        before += image * before_strides[0]
        z = tl.load(before + offsets(h, w, c, before_strides, LAST), mask=mask, other=0.0).to(tl.float32)
        passed = z
        if scale is not None:
            factor = by_channel(tl.load(scale + c, mask=c < channels, other=0.0), LAST)
            passed = z * factor + by_channel(tl.load(shift + c, mask=c < channels, other=0.0), LAST)
        if RELU:
            result = tl.where(passed > 0, result, 0.0)
        if norm is not None:
            z -= by_channel(tl.load(norm[0] + c, mask=c < channels, other=0.0), LAST)
            inverse = tl.rsqrt(tl.load(norm[1] + c, mask=c < channels, other=1.0) + norm[2])
            sums += tile.to(tl.int64) * channels
            tl.store(sums + c, sum_pixels(result * z, LAST) * inverse, mask=c < channels)
        elif sums is not None:
            sums += tile.to(tl.int64) * 2 * channels
            tl.store(sums + c, sum_pixels(result * z, LAST), mask=c < channels)
            tl.store(sums + channels + c, sum_pixels(result, LAST), mask=c < channels)
        if scale is not None:
            result *= factor
    dest += image * dest_strides[0]
    tl.store(dest + offsets(h, w, c, dest_strides, LAST), result.to(dest.dtype.element_ty), mask=mask)


def unroll(cols: Axis) -> int:
    """Taps whose loads are issued together: all of a bilinear transfer's, at most 4 of a window's."""
    return 1 if cols[4] == 1 else 2 if cols[4] == 2 else 4


def _flat(r: Resampling, maps: list[Tensor | None]) -> tuple[int, Axis, Axis, list[tuple[int, ...] | None]]:
    """(images, rows, cols, strides): the pixels of a copy are one row."""
    present = [m for m in maps if m is not None]
    images = present[0].shape[0]
    if not r.identity:
        return images, r.rows, r.cols, [None if m is None else m.stride() for m in maps]
    pixels = merged(*present)
    found = iter(pixels.strides)
    strides = [None if m is None else next(found) for m in maps]
    rows, cols = ((n, n, 1.0, 1.0, 1) for n in (pixels.height, pixels.width))
    return pixels.images, rows, cols, strides


def resample(
    r: Resampling,
    source: Tensor,
    dest: Tensor,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> None:
    """dest = R act(scale * (gate * source) + shift)."""
    images, rows, cols, (source_strides, dest_strides) = _flat(r, [source, dest])
    channels = dest.shape[1]
    problem = configs.Problem(
        "resample", source.dtype, is_last(dest), channels, channels, images, rows[1], cols[1], precision="ieee"
    )

    def run(config: configs.Config) -> None:
        tiles = images * ceil_div(rows[1], config.height) * ceil_div(cols[1], config.width)
        launch(
            resample_kernel,
            tiles * ceil_div(channels, config.channels),
            source.device,
            source,
            gate,
            scale,
            shift,
            dest,
            channels,
            rows,
            cols,
            source_strides,
            dest_strides,
            MODE=r.mode,
            ALIGN=r.align_corners,
            RELU=relu,
            LAST=problem.channels_last,
            WIDE=r.wide or is_wide(source, dest),
            UNROLL=unroll(cols),
            BLOCK_H=config.height,
            BLOCK_W=config.width,
            BLOCK_C=config.channels,
            num_warps=config.num_warps,
        )

    configs.run(problem, source.device, run)


def resample_transposed(
    r: Resampling,
    source: Tensor,
    dest: Tensor,
    *,
    before: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    outputs: tuple[Tensor, ...] = (),
) -> None:
    """dest = scale * m with m = R^T source where act passed; outputs, if any, become the sums of m * before and of m.

    With ``norm``, mean and variance per channel and eps, there is one output: the sum of m * (before - mean) / √(variance + eps).
    """
    transposed = r._replace(rows=r.rows_transposed, cols=r.cols_transposed)
    images, rows, cols, strides = _flat(transposed, [source, before, dest])
    source_strides, before_strides, dest_strides = strides
    channels = dest.shape[1]
    problem = configs.Problem(
        "resample_transposed",
        source.dtype,
        is_last(dest),
        channels,
        channels,
        images,
        rows[0],
        cols[0],
        precision="ieee",
    )

    def run(config: configs.Config) -> Tensor | None:
        tiles = images * ceil_div(rows[0], config.height) * ceil_div(cols[0], config.width)
        sums = None
        if outputs:
            sums = torch.empty((tiles, len(outputs) * channels), dtype=torch.float32, device=source.device)
        launch(
            resample_transposed_kernel,
            tiles * ceil_div(channels, config.channels),
            source.device,
            source,
            before,
            norm,
            scale,
            shift,
            dest,
            sums,
            channels,
            rows,
            cols,
            source_strides,
            before_strides,
            dest_strides,
            MODE=r.mode,
            ALIGN=r.align_corners,
            RELU=relu,
            LAST=problem.channels_last,
            WIDE=r.wide or is_wide(source, dest),
            UNROLL=unroll(cols),
            BLOCK_H=config.height,
            BLOCK_W=config.width,
            BLOCK_C=config.channels,
            num_warps=config.num_warps,
        )
        return sums

    sums = configs.run(problem, source.device, run)
    if outputs:
        sum_rows(sums, *outputs)
