"""The 1x1 products: gate, multiply, project (with batch statistics), and the weight's gradient."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import ceil_div, is_last, is_wide, launch, merged, precision
from .reduce import merge_statistics, sum_rows
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


# Traffic: x once from DRAM (again per further block of output channels, from L2: their programs are neighbours), z and g once;
# the statistics are 2 C' + 1 floats per tile of pixels.
@triton.jit(do_not_specialize=["height"])
def project_kernel(
    input,
    weight,
    bias,
    gate_weight,
    gate_bias,
    gate,
    output,
    counts,
    means,
    squares,
    channels,
    out_channels,
    height,
    width,
    weight_strides,
    input_strides,
    output_strides,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """output = act(W (g x) + bias), per tile its statistics; the gate is made from gate_weight, or read, or absent."""
    blocks = tl.cdiv(out_channels, BLOCK_N)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    image, h, w, valid = pixel_tile(tile, height, width, 1, BLOCK_P, WIDE)
    n = indices(block * BLOCK_N, BLOCK_N, False)
    input += image * input_strides[0]
    result = zeros(BLOCK_P, BLOCK_N, LAST)
    logit = tl.zeros((BLOCK_P,), tl.float32)
    for k0 in range(0, channels, BLOCK_K):
        k = indices(k0, BLOCK_K, WIDE)
        mask = by_pixel(valid, LAST) & by_channel(k < channels, LAST)
        x = tl.load(input + offsets(h, w, k, input_strides, LAST), mask=mask, other=0.0)
        matrix = load_matrix(weight, k, n, channels, out_channels, weight_strides[1], weight_strides[0], LAST)
        if gate_weight is not None:
            row = tl.load(gate_weight + k, mask=k < channels, other=0.0).to(tl.float32)
            logit += sum_channels(x.to(tl.float32) * by_channel(row, LAST), LAST)
        result = multiply(x, matrix, result, LAST, PRECISION)
    if gate is not None:
        gate += (image * height + h) * width + w
        if gate_weight is not None:
            if gate_bias is not None:
                logit += tl.load(gate_bias).to(tl.float32)
            g = sigmoid(logit)
            if block == 0:
                tl.store(gate, g.to(gate.dtype.element_ty), mask=valid)
        else:
            g = tl.load(gate, mask=valid, other=0.0).to(tl.float32)
        result *= by_pixel(g, LAST)
    if bias is not None:
        result += by_channel(tl.load(bias + n, mask=n < out_channels, other=0.0).to(tl.float32), LAST)
    if ACTIVATION == "relu":
        result = relu(result)
    elif ACTIVATION == "sigmoid":
        result = sigmoid(result)
    output += image * output_strides[0]
    rounded = result.to(output.dtype.element_ty)
    mask = by_pixel(valid, LAST) & by_channel(n < out_channels, LAST)
    tl.store(output + offsets(h, w, n, output_strides, LAST), rounded, mask=mask)
    if counts is not None:
        count = tl.sum(valid.to(tl.float32))
        rounded = tl.where(mask, rounded.to(tl.float32), 0.0)
        mean = sum_pixels(rounded, LAST) / count
        difference = tl.where(mask, rounded - by_channel(mean, LAST), 0.0)
        tl.store(counts + tile, count, mask=block == 0)
        at = tile.to(tl.int64) * out_channels + n
        tl.store(means + at, mean, mask=n < out_channels)
        tl.store(squares + at, sum_pixels(difference * difference, LAST), mask=n < out_channels)


def project(
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "none",
    statistics: tuple[Tensor, Tensor] | None = None,
    transposed: bool = False,
    exact: bool = False,
) -> None:
    """output = act(W (g x) + bias), with W^T for W if ``transposed``; the gate is written where gate_weight is given.

    ``exact``: no TF32, whatever torch allows. ``statistics``: the output's mean and biased variance per channel, to be filled.
    """
    channels, out_channels = input.shape[1], output.shape[1]
    strides = weight.stride()[:2]
    strides = (strides[1], strides[0]) if transposed else strides
    bias = None if bias is None else bias.contiguous()
    pixels = merged(input, output)
    problem = configs.Problem(
        "project",
        input.dtype,
        is_last(input),
        channels,
        out_channels,
        *pixels[:3],
        precision="ieee" if exact else precision(),
        tight=is_wide(input, output),
    )

    def run(config: configs.Config) -> tuple[Tensor | None, ...]:
        tiles = pixels.images * pixels.height * ceil_div(pixels.width, config.width)
        counts = means = squares = None
        if statistics is not None:
            counts = torch.empty(tiles, dtype=torch.float32, device=input.device)
            means, squares = torch.empty((2, tiles, out_channels), dtype=torch.float32, device=input.device)
        launch(
            project_kernel,
            tiles * ceil_div(out_channels, config.out_channels),
            input.device,
            input,
            weight,
            bias,
            gate_weight,
            gate_bias,
            gate,
            output,
            counts,
            means,
            squares,
            channels,
            out_channels,
            pixels.height,
            pixels.width,
            strides,
            *pixels.strides,
            ACTIVATION=activation,
            PRECISION=problem.precision,
            LAST=problem.channels_last,
            WIDE=problem.tight,
            BLOCK_P=config.width,
            BLOCK_N=config.out_channels,
            BLOCK_K=config.channels,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return counts, means, squares

    partial = configs.run(problem, input.device, run)
    if statistics is not None:
        merge_statistics(*partial, *statistics)


def gates(input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, gate: Tensor) -> None:
    """gate = sigmoid(rho x + b), for all rows of gate_weight (K, C, 1, 1): a projection of its own, never in TF32."""
    project(input, gate_weight, gate, bias=gate_bias, activation="sigmoid", exact=True)


class Gradient(NamedTuple):
    """dz = grad + grad_mean / count + 2 grad_var / count * (z - mean): how the statistics' gradients reach dz without a pass."""

    grad: Tensor
    z: Tensor | None = None
    mean: Tensor | None = None
    grad_mean: Tensor | None = None
    grad_var: Tensor | None = None

    @property
    def inverse_count(self) -> float:
        return 1 / max(1, self.grad.numel() // self.grad.shape[1])

    @property
    def maps(self) -> tuple[Tensor, Tensor]:
        """grad and z (or grad once more): the maps whose strides count."""
        return self.grad, self.grad if self.z is None else self.z


@triton.jit
def load_gradient(
    grad, z, mean, grad_mean, grad_var, inverse_count, h, w, o, valid, channels, grad_strides, z_strides, LAST: tl.constexpr
):  # fmt: skip
    """A tile of :class:`Gradient`, in the map's dtype; zero outside."""
    mask = by_pixel(valid, LAST) & by_channel(o < channels, LAST)
    stored = tl.load(grad + offsets(h, w, o, grad_strides, LAST), mask=mask, other=0.0)
    if mean is not None:
        value = stored.to(tl.float32)
        if grad_mean is not None:
            constant = tl.load(grad_mean + o, mask=o < channels, other=0.0) * inverse_count
            value += by_channel(constant, LAST)
        if grad_var is not None:
            projected = tl.load(z + offsets(h, w, o, z_strides, LAST), mask=mask, other=0.0).to(tl.float32)
            factor = 2.0 * inverse_count * tl.load(grad_var + o, mask=o < channels, other=0.0)
            centre = tl.load(mean + o, mask=o < channels, other=0.0)
            value += by_channel(factor, LAST) * (projected - by_channel(centre, LAST))
        stored = tl.where(mask, value, 0.0).to(stored.dtype)
    return stored


# Traffic: dz and x once per block of the weight (one block for C, C' <= 64; neighbours share their reading in L2), and the
# partial sums, 4 (C' C + C') bytes per range of pixels, whose number configs.splits() bounds.
@triton.jit(do_not_specialize=["images", "height", "tiles_per_split"])
def weight_gradient_kernel(
    grad,
    z,
    mean,
    grad_mean,
    grad_var,
    inverse_count,
    input,
    gate,
    sums,
    channels,
    out_channels,
    images,
    height,
    width,
    tiles_per_split,
    grad_strides,
    z_strides,
    input_strides,
    gate_strides,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial sums over a range of pixel tiles of dz (g x)^T and of dz."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks = blocks_c * tl.cdiv(out_channels, BLOCK_O)
    split = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    o = indices(block // blocks_c * BLOCK_O, BLOCK_O, WIDE)
    c = indices(block % blocks_c * BLOCK_C, BLOCK_C, WIDE)
    tiles = images * height * tl.cdiv(width, BLOCK_P)
    end = tl.minimum((split + 1) * tiles_per_split, tiles)
    result = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_O,), tl.float32)
    for tile in range(split * tiles_per_split, end):
        image, h, w, valid = pixel_tile(tile, height, width, 1, BLOCK_P, WIDE)
        dz = load_gradient(
            grad + image * grad_strides[0],
            z if z is None else z + image * z_strides[0],
            mean,
            grad_mean,
            grad_var,
            inverse_count,
            h,
            w,
            o,
            valid,
            out_channels,
            grad_strides,
            z_strides,
            LAST,
        )
        mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
        x = tl.load(input + image * input_strides[0] + offsets(h, w, c, input_strides, LAST), mask=mask, other=0.0)
        total += sum_pixels(dz.to(tl.float32), LAST)
        if gate is not None:
            at = image * gate_strides[0] + h * gate_strides[2] + w * gate_strides[3]
            g = tl.load(gate + at, mask=valid, other=0.0).to(tl.float32)
            dz = (dz.to(tl.float32) * by_pixel(g, LAST)).to(x.dtype)
        dz = dz.to(x.dtype)
        if LAST:
            result = tl.dot(tl.trans(dz), x, result, input_precision=PRECISION)
        else:
            result = tl.dot(dz, tl.trans(x), result, input_precision=PRECISION)
    sums += split.to(tl.int64) * out_channels * (channels + 1)
    mask = (o < out_channels)[:, None] & (c < channels)[None, :]
    tl.store(sums + o[:, None] * channels + c[None, :], result, mask=mask)
    if block % blocks_c == 0:
        tl.store(sums + out_channels * channels + o, total, mask=o < out_channels)


def weight_gradient(
    dz: Gradient, input: Tensor, gate: Tensor | None, grad_weight: Tensor, grad_bias: Tensor | None = None
) -> None:
    """grad_weight = the sum over pixels of dz (g x)^T, grad_bias that of dz."""
    channels, out_channels = input.shape[1], dz.grad.shape[1]
    maps = (*dz.maps, input, input if gate is None else gate)
    pixels = merged(*maps)
    problem = configs.Problem(
        "weight_gradient", input.dtype, is_last(input), channels, out_channels, *pixels[:3], precision=precision()
    )

    def run(config: configs.Config) -> Tensor:
        tiles = pixels.images * pixels.height * ceil_div(pixels.width, config.width)
        blocks = ceil_div(channels, config.channels) * ceil_div(out_channels, config.out_channels)
        row = out_channels * (channels + 1)
        wanted = configs.splits(configs.target_of(input.device), blocks, tiles, config.width, row)
        per_split = ceil_div(tiles, wanted)
        splits = ceil_div(tiles, max(1, per_split))
        sums = torch.empty((splits, row), dtype=torch.float32, device=input.device)
        launch(
            weight_gradient_kernel,
            splits * blocks,
            input.device,
            dz.grad,
            dz.z,
            dz.mean,
            dz.grad_mean,
            dz.grad_var,
            dz.inverse_count,
            input,
            gate,
            sums,
            channels,
            out_channels,
            pixels.images,
            pixels.height,
            pixels.width,
            per_split,
            *pixels.strides,
            PRECISION=problem.precision,
            LAST=problem.channels_last,
            WIDE=is_wide(*maps) or out_channels * channels >= 2**31,
            BLOCK_P=config.width,
            BLOCK_O=config.out_channels,
            BLOCK_C=config.channels,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return sums

    sums = configs.run(problem, input.device, run)
    sum_rows(sums, grad_weight, grad_bias)
