"""``upsample_cross_entropy`` in Triton: labels of any size see logits interpolated in registers.

Cells: the rows of labels that lie between logit rows k and k + 1 are cell k, columns alike. Rows above the first logit belong to
cell 0, and those below the last one to the last cell.
"""

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import power_of_2
from .launch import Axis, ceil_div, is_wide, launch, new_map, resampling
from .taps import bilinear_taps, first_reader, indices

LOWEST = tl.constexpr(-3e38)  # for a logit of -inf, which a weight of zero would turn into NaN
FORWARD_WIDTH, FORWARD_WARPS = 256, 4  # with 4 rows 8 labels per thread
BACKWARD_HEIGHT, BACKWARD_WARPS = 8, 4  # logit rows of a program: one more is computed, a cell above them
WINDOW, LARGEST_WINDOW = (
    64,
    128,
)  # columns of labels that a program of the backward pass holds; of the larger one twice the warps
CLASSES, LOGITS = 16, 16  # classes and columns of logits that it makes: the least sides of a matrix product


@triton.jit
def load_columns(source, first, second, weight, mask):
    """Logits interpolated along the columns; the second tap is not read where its weight is zero."""
    value = tl.load(source + first, mask=mask, other=0.0).to(tl.float32)
    value *= 1.0 - weight
    value += tl.load(source + second, mask=mask & (weight != 0), other=0.0).to(tl.float32) * weight
    return tl.where(value < LOWEST, LOWEST, value)


@triton.jit
def class_weight(weight, label, inside):
    if weight is None:
        return tl.full(label.shape, 1.0, tl.float32)
    else:
        return tl.load(weight + label, mask=inside, other=1.0)


# Traffic: the logits once (overlap from L1), the labels once, 4 bytes per label for the log-sum-exp, as many for the loss where
# it is wanted; 8 bytes per program. Interpolation is 1.5 loads from L1 per label and class for rows of 4 labels per logit.
@triton.jit(do_not_specialize=["rows"])
def upsample_cross_entropy_kernel(
    source,
    target,
    weight,
    logsumexp,
    loss,
    sums,
    channels,
    ignore_index,
    rows,
    cols,
    source_strides,
    target_strides,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """ROWS x BLOCK_W labels, which read TAPS rows of logits."""
    tile = tl.program_id(0)
    tiles_w = tl.cdiv(cols[1], BLOCK_W)
    tiles_h = tl.cdiv(rows[1], ROWS)
    h0 = tile // tiles_w % tiles_h * ROWS
    h = indices(h0, ROWS, WIDE)
    w = indices(tile % tiles_w * BLOCK_W, BLOCK_W, WIDE)
    image = (tile // (tiles_w * tiles_h)).to(tl.int64)
    valid = (h < rows[1])[:, None] & (w < cols[1])[None, :]
    first_row, _ = bilinear_taps(h0, rows, ALIGN)
    row, row_weight = bilinear_taps(h, rows, ALIGN)
    column, column_weight = bilinear_taps(w, cols, ALIGN)

    at = image * target_strides[0] + h[:, None] * target_strides[1] + w[None, :] * target_strides[2]
    label = tl.load(target + at, mask=valid, other=0).to(tl.int64)
    labelled = valid & (label != ignore_index)
    inside = labelled & (label >= 0) & (label < channels)
    label = tl.where(inside, label, -1).to(tl.int32)

    # Over the classes one by one: no class is computed in vain, and one exponential serves the sum and a new maximum.
    top = tl.full((ROWS, BLOCK_W), LOWEST, tl.float32)
    total = tl.zeros((ROWS, BLOCK_W), tl.float32)
    picked = tl.zeros((ROWS, BLOCK_W), tl.float32)
    source += image * source_strides[0]
    for c in range(0, channels):
        score = tl.zeros((ROWS, BLOCK_W), tl.float32)
        for t in tl.static_range(TAPS):
            y = tl.minimum(first_row + t, rows[0] - 1).to(w.dtype)
            base = source + y * source_strides[2]
            value = load_columns(
                base, column * source_strides[3], (column + 1) * source_strides[3], column_weight, w < cols[1]
            )
            factor = tl.where(row == first_row + t, 1.0 - row_weight, 0.0)
            factor += tl.where(row + 1 == first_row + t, row_weight, 0.0)
            score += factor[:, None] * value[None, :]
        picked = tl.where(label == c, score, picked)
        e = tl.exp(-tl.abs(score - top))
        total = tl.where(score > top, total * e + 1.0, total + e)
        top = tl.where(score > top, score, top)
        source += source_strides[1]

    result = top + tl.log(total)
    result = tl.where(labelled & (label < 0), float("nan"), result)  # a label that is no class
    flat = image * rows[1] * cols[1] + h[:, None] * cols[1] + w[None, :]
    tl.store(logsumexp + flat, result, mask=valid)
    factor = tl.where(labelled, class_weight(weight, label, inside), 0.0)
    value = tl.where(factor != 0, factor * (result - picked), 0.0)
    if sums is None:
        tl.store(loss + flat, value, mask=valid)
    else:
        tl.store(sums + 2 * tile, tl.sum(value))
        tl.store(sums + 2 * tile + 1, tl.sum(factor))


# Traffic: the sums of the programs once.
@triton.jit(do_not_specialize=["programs"])
def total_kernel(sums, loss, mass, programs, BLOCK: tl.constexpr):
    """The loss from every program's sums, in one order; with ``mass`` divided by it."""
    total = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(sums + 2 * at, mask=at < programs, other=0.0)
        weights += tl.load(sums + 2 * at + 1, mask=at < programs, other=0.0)
    result = tl.sum(total)
    if mass is not None:
        divisor = tl.sum(weights)
        tl.store(mass, divisor)
        result /= tl.where(divisor == 0, 1.0, divisor)
    tl.store(loss, result)


@triton.jit
def cell_begin(cell, axis, ALIGN: tl.constexpr):
    """The first label of a cell: 0 for cells before the first, the number of labels for those behind the last."""
    first = tl.minimum(first_reader(cell + 1, axis, "bilinear", ALIGN), axis[1])
    return tl.where(cell <= 0, 0, tl.where(cell >= axis[0], axis[1], first))


# Traffic: the logits once; the labels, the log-sum-exp and the loss's gradient once for every CLASSES classes (from L2 after the
# first); of these the cells between two programs twice, which is 1/8 of the rows and 1/15 of the columns at 4 labels per logit;
# the gradient once.
@triton.jit(do_not_specialize=["rows"])
def upsample_cross_entropy_backward_kernel(
    source,
    target,
    weight,
    logsumexp,
    grad_loss,
    mass,
    dest,
    channels,
    ignore_index,
    rows,
    cols,
    source_strides,
    target_strides,
    logsumexp_strides,
    grad_strides,
    dest_strides,
    logits,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    CLASSES: tl.constexpr,
    WINDOW: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """HEIGHT x logits gradients of CLASSES classes, gathered from the cells around them, row by row.

    The labels of the columns fit one window; else (``WINDOWS``) HEIGHT is 1 and windows follow each other.
    """
    blocks_c = tl.cdiv(channels, CLASSES)
    blocks_w = tl.cdiv(cols[0], logits)
    blocks_h = tl.cdiv(rows[0], HEIGHT)
    block = tl.program_id(0) // blocks_c
    c = indices(tl.program_id(0) % blocks_c * CLASSES, CLASSES, WIDE)
    j0 = block % blocks_w * logits
    j = indices(j0, LOGITS, WIDE)
    i0 = block // blocks_w % blocks_h * HEIGHT
    image = (block // (blocks_w * blocks_h)).to(tl.int64)
    source += image * source_strides[0] + (c * source_strides[1])[:, None]
    dest += image * dest_strides[0] + (c * dest_strides[1])[:, None] + (j * dest_strides[3])[None, :]
    target += image * target_strides[0]
    logsumexp += image * logsumexp_strides[0]
    grad_loss += image * grad_strides[0]
    owned = (j < tl.minimum(j0 + logits, cols[0]))[None, :] & (c < channels)[:, None]
    divisor = 1.0
    if mass is not None:
        divisor = tl.load(mass)
        divisor = tl.where(divisor == 0, 1.0, divisor)

    begin = cell_begin(j0 - 1, cols, ALIGN)
    end = begin + 1
    if WINDOWS:
        end = cell_begin(tl.minimum(j0 + logits, cols[0]), cols, ALIGN)
    result = tl.zeros((CLASSES, LOGITS), tl.float32)
    for window in range(0, end - begin, WINDOW):
        w = indices(begin + window, WINDOW, WIDE)
        column, column_weight = bilinear_taps(w, cols, ALIGN)
        first, second = (column * source_strides[3])[None, :], ((column + 1) * source_strides[3])[None, :]
        mask = (w < cols[1])[None, :] & (c < channels)[:, None]
        spread = tl.where(column[:, None] == j[None, :], (1.0 - column_weight)[:, None], 0.0)
        spread += tl.where((column + 1)[:, None] == j[None, :], column_weight[:, None], 0.0)
        spread = tl.where((w < cols[1])[:, None], spread, 0.0)

        y = tl.maximum(i0 - 1, 0).to(w.dtype)
        upper = load_columns(source + y * source_strides[2], first, second, column_weight[None, :], mask)
        carried = tl.zeros((CLASSES, WINDOW), tl.float32)
        for k in range(0, tl.minimum(HEIGHT, rows[0] - i0) + 1):
            cell = i0 - 1 + k
            y = tl.minimum(cell + 1, rows[0] - 1).to(w.dtype)
            lower = load_columns(source + y * source_strides[2], first, second, column_weight[None, :], mask)
            gathered = carried
            carried = tl.zeros((CLASSES, WINDOW), tl.float32)
            h0 = cell_begin(cell, rows, ALIGN)
            for n in range(0, cell_begin(cell + 1, rows, ALIGN) - h0):
                h = h0 + n
                _row, row_weight = bilinear_taps(h, rows, ALIGN)
                y = h.to(w.dtype)
                label = tl.load(target + y * target_strides[1] + w * target_strides[2], mask=w < cols[1], other=0)
                label = label.to(tl.int64)
                labelled = (w < cols[1]) & (label != ignore_index)
                inside = labelled & (label >= 0) & (label < channels)
                grad = tl.load(grad_loss + y * grad_strides[1] + w * grad_strides[2], mask=labelled, other=0.0)
                factor = class_weight(weight, label, inside)
                factor = tl.where(labelled & (factor != 0), factor * (grad / divisor), 0.0)
                at = y * logsumexp_strides[1] + w * logsumexp_strides[2]
                total = tl.load(logsumexp + at, mask=w < cols[1], other=0.0)
                score = (1.0 - row_weight) * upper + row_weight * lower
                value = tl.exp(score - total[None, :]) - tl.where(label[None, :] == c[:, None], 1.0, 0.0)
                value *= factor[None, :]
                gathered += (1.0 - row_weight) * value
                carried += row_weight * value
            made = tl.dot(gathered, spread, input_precision="ieee")
            if WINDOWS:
                if k > 0:
                    result += made
            else:
                y = tl.maximum(cell, 0).to(w.dtype)
                tl.store(dest + y * dest_strides[2], made.to(dest.dtype.element_ty), mask=owned & (k > 0))
            upper = lower
    if WINDOWS:
        tl.store(dest + i0.to(j.dtype) * dest_strides[2], result.to(dest.dtype.element_ty), mask=owned)


def _starts(axis: Axis, align_corners: bool) -> np.ndarray:
    """The first logit that each label reads."""
    position, step = np.arange(axis[1], dtype=np.float32), np.float32(axis[2])
    if align_corners:
        position = position * step
    else:
        position = np.maximum((position + np.float32(0.5)) * step - np.float32(0.5), 0)
    return np.minimum(position.astype(np.int64), axis[0] - 1)


def _slack(axis: Axis) -> int:
    """By how much a GPU's rounding may widen a range of labels: a label may fall between two logits to either side."""
    return 0 if float(axis[2] * 1024).is_integer() else 2


@lru_cache(maxsize=1024)
def rows_and_taps(axis: Axis, align_corners: bool) -> tuple[int, int]:
    """How many rows of labels a program takes, and how many rows of logits they read: not more than they are themselves."""
    starts = _starts(axis, align_corners)
    for rows in (4, 2):
        last = np.minimum(np.arange(0, axis[1], rows) + rows - 1, axis[1] - 1)
        taps = int((starts[last] - starts[::rows]).max()) + 2 + (_slack(axis) > 0)
        if taps <= rows + 1:
            return rows, taps
    return 1, 2


@lru_cache(maxsize=1024)
def logits_and_window(axis: Axis, align_corners: bool) -> tuple[int, int, bool]:
    """How many columns of logits a program makes, of how many columns of labels at a time, and whether these are not all."""
    starts = _starts(axis, align_corners)
    begin = np.searchsorted(starts, np.arange(-1, axis[0] + 1))  # of cells -1 ... axis[0]

    def span(logits: int) -> int:
        first = np.arange(0, axis[0], logits)
        return int((begin[np.minimum(first + logits, axis[0]) + 1] - begin[first]).max()) + _slack(axis)

    window = min(max(power_of_2(span(LOGITS - 1)), LOGITS), WINDOW)
    fitting = [logits for logits in range(1, LOGITS + 1) if span(logits) <= window]
    if fitting:
        return fitting[-1], window, False
    return 1, min(power_of_2(span(1)), LARGEST_WINDOW), span(1) > LARGEST_WINDOW


def forward(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    images, channels, *size = input.shape
    r = resampling((size[0], size[1]), (target.shape[1], target.shape[2]), "bilinear", align_corners, None, None)
    height, taps = rows_and_taps(r.rows, align_corners)
    width = min(FORWARD_WIDTH, max(32, power_of_2(target.shape[2])))
    programs = images * ceil_div(target.shape[1], height) * ceil_div(target.shape[2], width)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=input.device)

    logsumexp, mass = new(*target.shape), new() if reduction == "mean" else new(0)
    loss = new(*target.shape) if reduction == "none" else new()
    sums = None if reduction == "none" else new(programs, 2)
    launch(
        upsample_cross_entropy_kernel,
        programs,
        input.device,
        input,
        target,
        None if weight is None else weight.contiguous(),
        logsumexp,
        loss,
        sums,
        channels,
        ignore_index,
        r.rows,
        r.cols,
        input.stride(),
        target.stride(),
        ALIGN=align_corners,
        WIDE=is_wide(input, target[:, None], logsumexp[:, None]),
        ROWS=height,
        TAPS=taps,
        BLOCK_W=width,
        num_warps=max(1, min(FORWARD_WARPS, width // 64)),
    )
    if sums is not None:
        mean = mass if reduction == "mean" else None
        launch(total_kernel, 1, input.device, sums, loss, mean, programs, BLOCK=1024, num_warps=8)
    return loss, logsumexp, mass


def backward(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logsumexp: Tensor,
    mass: Tensor,
    ignore_index: int,
    reduction: str,
    align_corners: bool,
) -> Tensor:
    images, channels, *size = input.shape
    r = resampling((size[0], size[1]), (target.shape[1], target.shape[2]), "bilinear", align_corners, None, None)
    logits, window, windows = logits_and_window(r.cols, align_corners)
    height = 1 if windows else BACKWARD_HEIGHT
    grad_input = new_map(input, channels, size[0], size[1])
    maps = (target, logsumexp, grad_loss) if reduction == "none" else (target, logsumexp)
    launch(
        upsample_cross_entropy_backward_kernel,
        images * ceil_div(size[0], height) * ceil_div(size[1], logits) * ceil_div(channels, CLASSES),
        input.device,
        input,
        target,
        None if weight is None else weight.contiguous(),
        logsumexp,
        grad_loss,
        mass if reduction == "mean" else None,
        grad_input,
        channels,
        ignore_index,
        r.rows,
        r.cols,
        input.stride(),
        target.stride(),
        logsumexp.stride(),
        grad_loss.stride() if reduction == "none" else (0, 0, 0),
        grad_input.stride(),
        logits,
        ALIGN=align_corners,
        WIDE=is_wide(input, grad_input, *(m[:, None] for m in maps)),
        WINDOWS=windows,
        HEIGHT=height,
        CLASSES=CLASSES,
        WINDOW=window,
        LOGITS=LOGITS,
        num_warps=BACKWARD_WARPS if window <= WINDOW else 2 * BACKWARD_WARPS,
    )
    return grad_input
