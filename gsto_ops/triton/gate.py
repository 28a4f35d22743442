"""The gate without a product of its own: fused with average pooling (and the projection of the pooled map), and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import Resampling, ceil_div, is_last, is_wide, launch, merged, precision
from .product import Gradient, load_gradient
from .reduce import sum_rows
from .resample import unroll
from .taps import (
    by_channel,
    by_pixel,
    first_reader,
    indices,
    load_matrix,
    multiply,
    offsets,
    pixel_tile,
    reader_weight,
    relu,
    sigmoid,
    sum_channels,
    sum_pixels,
    tap,
    zeros,
)

MAX_CHANNELS = 512  # of a pixel that gate_pool holds in registers


def fits_gate_pool(input: Tensor, weight: Tensor | None) -> bool:
    """Whether a pixel's channels fit the registers, together with 64-bit offsets or the operands of a product in float32."""
    quarter = is_wide(input) or (weight is not None and input.element_size() == 4)
    return input.shape[1] <= (MAX_CHANNELS // 4 if quarter else MAX_CHANNELS)


# Traffic: x once (windows that overlap by a row or column read it again, from L1/L2), g and dest once. The map between pooling
# and projection stays in registers.
@triton.jit(do_not_specialize=["rows"])
def gate_pool_kernel(
    input,
    gate_weight,
    gate_bias,
    gate,
    weight,
    bias,
    dest,
    channels,
    out_channels,
    rows,
    cols,
    weight_strides,
    input_strides,
    dest_strides,
    MODE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dest = W R act(g x) + bias with R average pooling or a copy; without weight dest = R act(g x). Writes the gate."""
    image, h, w, valid = pixel_tile(tl.program_id(0), rows[1], cols[1], BLOCK_H, BLOCK_W, WIDE)
    c = indices(0, BLOCK_C, WIDE)
    input += image * input_strides[0]
    gate += image * rows[0] * cols[0]
    row = by_channel(tl.load(gate_weight + c, mask=c < channels, other=0.0).to(tl.float32), LAST)
    constant = 0.0
    if gate_bias is not None:
        constant = tl.load(gate_bias).to(tl.float32)
    pooled = zeros(BLOCK_H * BLOCK_W, BLOCK_C, LAST)
    for r in range(0, rows[4]):
        y, weight_y = tap(h, r, rows, MODE, False)
        for s0 in range(0, cols[4], UNROLL):
            for s in tl.static_range(UNROLL):
                x, weight_x = tap(w, s0 + s, cols, MODE, False)
                tap_weight = weight_y * weight_x
                needed = valid & (tap_weight != 0)
                mask = by_pixel(needed, LAST) & by_channel(c < channels, LAST)
                value = tl.load(input + offsets(y, x, c, input_strides, LAST), mask=mask, other=0.0).to(tl.float32)
                g = sigmoid(sum_channels(value * row, LAST) + constant)
                # Windows that overlap write a gate twice, the same value.
                tl.store(gate + y * cols[0] + x, g.to(gate.dtype.element_ty), mask=needed)
                value *= by_pixel(g, LAST)
                if RELU:
                    value = relu(value)
                pooled += by_pixel(tap_weight, LAST) * value
    dest += image * dest_strides[0]
    if weight is None:
        mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
        tl.store(dest + offsets(h, w, c, dest_strides, LAST), pooled.to(dest.dtype.element_ty), mask=mask)
    else:
        rounded = pooled.to(input.dtype.element_ty)
        for n0 in range(0, out_channels, BLOCK_N):
            n = indices(n0, BLOCK_N, WIDE)
            matrix = load_matrix(weight, c, n, channels, out_channels, weight_strides[1], weight_strides[0], LAST)
            result = multiply(rounded, matrix, zeros(BLOCK_H * BLOCK_W, BLOCK_N, LAST), LAST, PRECISION)
            if bias is not None:
                result += by_channel(tl.load(bias + n, mask=n < out_channels, other=0.0).to(tl.float32), LAST)
            mask = by_pixel(valid, LAST) & by_channel(n < out_channels, LAST)
            tl.store(dest + offsets(h, w, n, dest_strides, LAST), result.to(dest.dtype.element_ty), mask=mask)


def gate_pool(
    r: Resampling,
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    gate: Tensor,
    dest: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
) -> None:
    """dest = W R act(g x) + bias (or R act(g x) without weight) and the gate, for maps that fits_gate_pool()."""
    images, rows, cols = input.shape[0], r.rows, r.cols
    bias = None if bias is None else bias.contiguous()
    strides = [input.stride(), dest.stride()]
    if r.identity:
        images, height, width, strides = merged(input, dest)
        rows, cols = ((n, n, 1.0, 1.0, 1) for n in (height, width))
    channels, out_channels = input.shape[1], dest.shape[1]
    wide = r.wide or is_wide(input, dest)
    problem = configs.Problem(
        "gate_pool" if weight is None else "gate_pool_project",
        input.dtype,
        is_last(input),
        channels,
        out_channels,
        images,
        rows[1],
        cols[1],
        precision=precision(),
        tight=wide or (weight is None and not r.identity),  # else 128 - 160 bytes per thread do not fit
    )

    def run(config: configs.Config) -> None:
        launch(
            gate_pool_kernel,
            images * ceil_div(rows[1], config.height) * ceil_div(cols[1], config.width),
            input.device,
            input,
            gate_weight,
            gate_bias,
            gate,
            weight,
            bias,
            dest,
            channels,
            out_channels,
            rows,
            cols,
            None if weight is None else weight.stride()[:2],
            *strides,
            MODE=r.mode,
            RELU=relu,
            PRECISION=problem.precision,
            LAST=problem.channels_last,
            WIDE=wide,
            UNROLL=min(2, unroll(cols)),
            BLOCK_H=config.height,
            BLOCK_W=config.width,
            BLOCK_C=config.channels,
            BLOCK_N=config.out_channels,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    configs.run(problem, input.device, run)


@triton.jit
def _gradient_block(
    grad, z, mean, grad_mean, grad_var, inverse_count, weight, input,
    channels, out_channels, rows, cols, weight_strides, grad_strides, z_strides, input_strides,
    h, w, c, valid, first_y, first_x,
    MODE: tl.constexpr, ALIGN: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
    UNROLL: tl.constexpr, PIXELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(x, du) of a block of channels: du = W^T dz where there is a weight, else R^T source."""
    mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
    x = tl.load(input + offsets(h, w, c, input_strides, LAST), mask=mask, other=0.0).to(tl.float32)
    du = zeros(PIXELS, BLOCK_C, LAST)
    if weight is not None:
        for k0 in range(0, out_channels, BLOCK_K):
            k = indices(k0, BLOCK_K, False).to(c.dtype)
            dz = load_gradient(
                grad, z, mean, grad_mean, grad_var, inverse_count, h, w, k, valid, out_channels, grad_strides, z_strides, LAST
            )  # fmt: skip
            matrix = load_matrix(weight, k, c, out_channels, channels, weight_strides[0], weight_strides[1], LAST)
            du = multiply(dz, matrix, du, LAST, PRECISION)
    else:
        for r in range(0, rows[4]):
            weight_y = reader_weight(first_y + r, h, rows, MODE, ALIGN)
            for s0 in range(0, cols[4], UNROLL):
                for s in tl.static_range(UNROLL):
                    at = first_x + s0 + s
                    factor = weight_y * reader_weight(at, w, cols, MODE, ALIGN)
                    needed = by_pixel(valid & (factor != 0), LAST) & by_channel(c < channels, LAST)
                    value = tl.load(grad + offsets(first_y + r, at, c, grad_strides, LAST), mask=needed, other=0.0)
                    du += by_pixel(factor, LAST) * value.to(tl.float32)
        if RELU:  # x acted through relu(g x), and g > 0
            du = tl.where(x > 0, du, 0.0)
    return x, du


@triton.jit
def _gate_block(
    x, du, g, dlogit, gate_weight, grad_input, sums, channels, grad_input_strides, h, w, c, valid, LAST: tl.constexpr
):  # fmt: skip
    """dx = g du + rho dl, and the sums of dl x."""
    row = tl.load(gate_weight + c, mask=c < channels, other=0.0).to(tl.float32)
    dx = by_pixel(g, LAST) * du + by_channel(row, LAST) * by_pixel(dlogit, LAST)
    mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
    tl.store(grad_input + offsets(h, w, c, grad_input_strides, LAST), dx.to(grad_input.dtype.element_ty), mask=mask)
    tl.store(sums + c, sum_pixels(x * by_pixel(dlogit, LAST), LAST), mask=c < channels)


# Traffic: x and dz (or the source, smaller or of x's size) once from DRAM and dx once; C + 1 floats of sums per tile. Where the
# channels take several blocks, x and dz are read a second time, from L1/L2, once all of du . x is known.
@triton.jit(do_not_specialize=["rows"])
def gate_backward_kernel(
    grad,
    z,
    mean,
    grad_mean,
    grad_var,
    inverse_count,
    weight,
    input,
    gate,
    gate_weight,
    grad_gate,
    grad_input,
    sums,
    channels,
    out_channels,
    rows,
    cols,
    weight_strides,
    grad_strides,
    z_strides,
    input_strides,
    grad_input_strides,
    MODE: tl.constexpr,
    ALIGN: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dl = (du . x + grad_gate) g (1 - g), dx = g du + rho dl; per tile the sums of dl x and of dl."""
    tile = tl.program_id(0)
    PIXELS: tl.constexpr = BLOCK_H * BLOCK_W
    image, h, w, valid = pixel_tile(tile, rows[0], cols[0], BLOCK_H, BLOCK_W, WIDE)
    first_y = first_reader(h, rows, MODE, ALIGN)
    first_x = first_reader(w, cols, MODE, ALIGN)
    grad += image * grad_strides[0]
    if z is not None:
        z += image * z_strides[0]
    input += image * input_strides[0]
    grad_input += image * grad_input_strides[0]
    sums += tile.to(tl.int64) * (channels + 1)
    at = (image * rows[0] + h) * cols[0] + w
    g = tl.load(gate + at, mask=valid, other=0.0).to(tl.float32)
    dlogit = tl.zeros((PIXELS,), tl.float32)
    if grad_gate is not None:
        dlogit += tl.load(grad_gate + at, mask=valid, other=0.0).to(tl.float32)
    if SINGLE:
        c = indices(0, BLOCK_C, WIDE)
        x, du = _gradient_block(
            grad, z, mean, grad_mean, grad_var, inverse_count, weight, input,
            channels, out_channels, rows, cols, weight_strides, grad_strides, z_strides, input_strides,
            h, w, c, valid, first_y, first_x, MODE, ALIGN, RELU, PRECISION, LAST, UNROLL, PIXELS, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        dlogit = (dlogit + sum_channels(x * du, LAST)) * g * (1 - g)
        _gate_block(x, du, g, dlogit, gate_weight, grad_input, sums, channels, grad_input_strides, h, w, c, valid, LAST)
    else:
        for c0 in range(0, channels, BLOCK_C):
            x, du = _gradient_block(
                grad, z, mean, grad_mean, grad_var, inverse_count, weight, input,
                channels, out_channels, rows, cols, weight_strides, grad_strides, z_strides, input_strides,
                h, w, indices(c0, BLOCK_C, WIDE), valid, first_y, first_x,
                MODE, ALIGN, RELU, PRECISION, LAST, UNROLL, PIXELS, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            dlogit += sum_channels(x * du, LAST)
        dlogit = dlogit * g * (1 - g)
        for c0 in range(0, channels, BLOCK_C):
            c = indices(c0, BLOCK_C, WIDE)
            x, du = _gradient_block(
                grad, z, mean, grad_mean, grad_var, inverse_count, weight, input,
                channels, out_channels, rows, cols, weight_strides, grad_strides, z_strides, input_strides,
                h, w, c, valid, first_y, first_x, MODE, ALIGN, RELU, PRECISION, LAST, UNROLL, PIXELS, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            _gate_block(
                x, du, g, dlogit, gate_weight, grad_input, sums, channels, grad_input_strides, h, w, c, valid, LAST
            )
    tl.store(sums + channels, tl.sum(dlogit))


def gate_backward(
    r: Resampling,
    dz: Gradient,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    grad_gate: Tensor | None,
    *,
    weight: Tensor | None = None,
    relu: bool = False,
    grad_input: Tensor,
    grad_gate_weight: Tensor,
    grad_gate_bias: Tensor,
) -> None:
    """The gate's backward with du = W^T dz where a weight is given (R is then a copy), else du = R^T dz.grad.

    ``relu``: the forward was R relu(g x).
    """
    images, rows, cols = input.shape[0], r.rows_transposed, r.cols_transposed
    strides = [*(m.stride() for m in dz.maps), input.stride(), grad_input.stride()]
    if r.identity:
        images, height, width, strides = merged(*dz.maps, input, grad_input)
        rows, cols = ((n, n, 1.0, 1.0, 1) for n in (height, width))
    channels, out_channels = input.shape[1], dz.grad.shape[1]
    wide = r.wide or is_wide(*dz.maps, input)
    problem = configs.Problem(
        "gate_backward" if weight is None else "project_backward",
        input.dtype,
        is_last(input),
        channels,
        out_channels,
        images,
        rows[0],
        cols[0],
        precision=precision(),
        # The mask of 8192 elements: 112 bytes per thread do not fit; nor do 56 of taps with aligned corners.
        tight=wide or (weight is None and (relu or r.align_corners)),
    )

    def run(config: configs.Config) -> Tensor:
        tiles = images * ceil_div(rows[0], config.height) * ceil_div(cols[0], config.width)
        sums = torch.empty((tiles, channels + 1), dtype=torch.float32, device=input.device)
        launch(
            gate_backward_kernel,
            tiles,
            input.device,
            dz.grad,
            dz.z,
            dz.mean,
            dz.grad_mean,
            dz.grad_var,
            dz.inverse_count,
            weight,
            input,
            gate,
            gate_weight,
            grad_gate,
            grad_input,
            sums,
            channels,
            out_channels,
            rows,
            cols,
            None if weight is None else weight.stride()[:2],
            *strides,
            MODE=r.mode,
            ALIGN=r.align_corners,
            RELU=relu,
            PRECISION=problem.precision,
            LAST=problem.channels_last,
            WIDE=wide,
            UNROLL=min(2, unroll(cols)),
            SINGLE=config.channels >= channels,
            BLOCK_H=config.height,
            BLOCK_W=config.width,
            BLOCK_C=config.channels,
            BLOCK_K=config.out_channels,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return sums

    sums = configs.run(problem, input.device, run)
    sum_rows(sums, grad_gate_weight, grad_gate_bias)
