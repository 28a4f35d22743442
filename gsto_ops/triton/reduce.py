"""The second phases of the reductions, in an order that depends on the shapes alone: sums of rows, merging of variances."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, launch

ROWS = 1024  # that one program adds up; more of them take another launch, of a few microseconds
COLUMNS = 8  # 32 bytes: a sector of a row


# Traffic: every row once.
@triton.jit(do_not_specialize=["rows", "columns", "split"])
def sum_rows_kernel(source, dest, tail, rows, columns, split, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of ROWS rows each, columns from ``split`` on going to ``tail``."""
    blocks = tl.cdiv(columns, COLUMNS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = group * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.sum(tl.load(source + row[:, None] * columns + column[None, :], mask=mask, other=0.0), 0)
    head = column < tl.minimum(split, columns)
    tl.store(dest + group * split + column, total.to(dest.dtype.element_ty), mask=head)
    if tail is not None:
        at = tail + group * (columns - split) + column - split
        tl.store(at, total.to(tail.dtype.element_ty), mask=(column >= split) & (column < columns))


def sum_rows(source: Tensor, dest: Tensor, tail: Tensor | None = None) -> None:
    """dest (and behind it tail) = the sum of the rows of ``source``, a contiguous float32 matrix."""
    rows, columns = source.shape
    if rows == 0:
        dest.zero_()
        if tail is not None:
            tail.zero_()
        return
    blocks = ceil_div(columns, COLUMNS)
    while True:
        groups = ceil_div(rows, ROWS)
        last = groups == 1
        between = dest if last else torch.empty((groups, columns), dtype=torch.float32, device=source.device)
        launch(
            sum_rows_kernel,
            groups * blocks,
            source.device,
            source,
            between,
            tail if last else None,
            rows,
            columns,
            dest.numel() if last else columns,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=16,
        )
        if last:
            return
        source, rows = between, groups


# Traffic: every row once.
@triton.jit(do_not_specialize=["rows", "channels"])
def merge_statistics_kernel(
    counts, means, squares, counts_out, means_out, squares_out, rows, channels, LAST_LEVEL: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr
):  # fmt: skip
    """(count, mean, sum of squared differences from it) of ROWS rows each, merged; at the last level the variance."""
    blocks = tl.cdiv(channels, COLUMNS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = group * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (c < channels)[None, :]
    at = row[:, None] * channels + c[None, :]
    count = tl.load(counts + row, mask=row < rows, other=0.0)[:, None]
    mean = tl.load(means + at, mask=mask, other=0.0)
    square = tl.load(squares + at, mask=mask, other=0.0)
    total = tl.sum(count)
    # Differences from one row's mean keep the digits that a large common mean would cost.
    pivot = tl.load(means + group * ROWS * channels + c, mask=c < channels, other=0.0)
    difference = (mean - pivot[None, :]).to(tl.float32)
    shift = tl.sum(count * difference, 0) / total
    difference = tl.where(mask, difference - shift[None, :], 0.0)
    spread = tl.sum(square + count * difference * difference, 0)
    if LAST_LEVEL:
        spread /= total
    else:
        tl.store(counts_out + group, total)
    merged = (pivot + shift).to(means_out.dtype.element_ty)
    tl.store(means_out + group * channels + c, merged, mask=c < channels)
    tl.store(squares_out + group * channels + c, spread, mask=c < channels)


def merge_statistics(counts: Tensor, means: Tensor, squares: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Mean and biased variance per channel from those of tiles: (tiles,), (tiles, C), (tiles, C). NaN without tiles.

    Means in float64 keep the variance of the means exact where their common part is large.
    """
    rows, channels = means.shape
    if rows == 0:
        mean.fill_(float("nan"))
        variance.fill_(float("nan"))
        return
    blocks = ceil_div(channels, COLUMNS)
    while True:
        groups = ceil_div(rows, ROWS)
        last = groups == 1
        between = counts.new_empty((0,) if last else (groups,))
        means_out = mean if last else means.new_empty((groups, channels))
        squares_out = variance if last else squares.new_empty((groups, channels))
        launch(
            merge_statistics_kernel,
            groups * blocks,
            counts.device,
            counts,
            means,
            squares,
            between,
            means_out,
            squares_out,
            rows,
            channels,
            LAST_LEVEL=last,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=16,
        )
        if last:
            return
        counts, means, squares, rows = between, means_out, squares_out, groups
