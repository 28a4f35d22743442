"""All that leaves one branch of a gated fusion, from one read: gates, gated projections with statistics, gated copies; backward.

A tile holds all channels of its pixels where they fit (``SINGLE``), so that the gates are known before anything is written.
"""

from collections.abc import Sequence

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

Maps = Sequence[Tensor]


def _kernel_name(kernel: str, weight: Tensor | None) -> str:
    return f"{kernel}_copies" if weight is None else kernel


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
    name = _kernel_name("gated_split", weight)
    problem = configs.Problem(name, input.dtype, is_last(input), channels, widest, *pixels[:3], precision=precision())

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
            WIDE=is_wide(input, gate, *projected, *gated),
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


@triton.jit
def _gradient(
    k: tl.constexpr, projected, gated, weight, first, split, channels, projected_strides, gated_strides, weight_strides,
    image, h, w, c, valid, GROUPS: tl.constexpr, COPIES: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of gate_k x for a block of channels: W_k^T dz_k, that of a gated copy, or none."""
    du = zeros(BLOCK_P, BLOCK_C, LAST)
    if k < GROUPS:
        strides = projected_strides[k]
        grad = projected[k] + image * strides[0]
        for o0 in range(0, split[k], BLOCK_K):
            o = indices(o0, BLOCK_K, WIDE)
            mask = by_pixel(valid, LAST) & by_channel(o < split[k], LAST)
            dz = tl.load(grad + offsets(h, w, o, strides, LAST), mask=mask, other=0.0)
            rows = weight + first * weight_strides[0]
            matrix = load_matrix(rows, o, c, split[k], channels, weight_strides[0], weight_strides[1], LAST)
            du = multiply(dz, matrix, du, LAST, PRECISION)
    elif k < GROUPS + COPIES:
        copy_strides = gated_strides[k - GROUPS]
        at = image * copy_strides[0] + offsets(h, w, c, copy_strides, LAST)
        mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
        du = tl.load(gated[k - GROUPS] + at, mask=mask, other=0.0).to(tl.float32)
    return du


@triton.jit
def _logit_gradient(dot, grad_gate, gate, at, valid, RELU: tl.constexpr):
    """(g, dl) with dl = (dot + grad_gate) g (1 - g), zero where the ReLU before the sigmoid was closed: there g is 0.5."""
    g = tl.load(gate + at, mask=valid, other=0.0).to(tl.float32)
    if grad_gate is not None:
        dot += tl.load(grad_gate + at, mask=valid, other=0.0).to(tl.float32)
    dl = dot * g * (1 - g)
    if RELU:
        dl = tl.where(g > 0.5, dl, 0.0)
    return g, dl


# Traffic: x and the gradients of the projections and copies once; the gradients' float32 logits written once.
@triton.jit(do_not_specialize=["height"])
def gated_split_dot_kernel(
    projected,
    gated,
    grad_gate,
    input,
    gate,
    weight,
    grad_logit,
    channels,
    split,
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
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradients of the gates' logits, where a tile does not hold all channels of a pixel."""
    image, h, w, valid = pixel_tile(tl.program_id(0), height, width, 1, BLOCK_P, WIDE)
    first = 0
    for k in tl.static_range(GATES):
        dot = tl.zeros((BLOCK_P,), tl.float32)
        for c0 in range(0, channels, BLOCK_C):
            c = indices(c0, BLOCK_C, WIDE)
            mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
            place = image * input_strides[0] + offsets(h, w, c, input_strides, LAST)
            x = tl.load(input + place, mask=mask, other=0.0).to(tl.float32)
            du = _gradient(
                k, projected, gated, weight, first, split, channels, projected_strides, gated_strides, weight_strides,
                image, h, w, c, valid, GROUPS, COPIES, PRECISION, LAST, WIDE, BLOCK_P, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            dot += sum_channels(x * du, LAST)
        at = image * gate_strides[0] + k * gate_strides[1] + h * gate_strides[2] + w * gate_strides[3]
        _g, dl = _logit_gradient(dot, grad_gate, gate, at, valid, RELU)
        tl.store(grad_logit + at, dl, mask=valid)
        if k < GROUPS:
            first += split[k]


# Traffic: x, the gradients of the projections and of the copies once, dx once, the gates once: 2 (2 + copies + rows / C) bytes
# per element of 16-bit maps; K (C + 1) floats of sums per tile. Where a tile does not hold all channels of a pixel all is read
# twice, first for the logits' gradients (4 bytes per gate and pixel), and the projections' once per block of channels.
@triton.jit(do_not_specialize=["height"])
def gated_split_backward_kernel(
    projected,
    gated,
    grad_gate,
    input,
    gate,
    gate_weight,
    weight,
    grad_logit,
    grad_input,
    sums,
    channels,
    split,
    height,
    width,
    weight_strides,
    input_strides,
    grad_input_strides,
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
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx = the sum over k of gate_k du_k + rho_k dl_k, du_k that of gate_k x; per tile the sums of dl_k x and of dl_k."""
    blocks = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    image, h, w, valid = pixel_tile(tile, height, width, 1, BLOCK_P, WIDE)
    c = indices(block * BLOCK_C, BLOCK_C, WIDE)
    mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
    at = image * input_strides[0] + offsets(h, w, c, input_strides, LAST)
    x = tl.load(input + at, mask=mask, other=0.0).to(tl.float32)
    sums += tile.to(tl.int64) * GATES * (channels + 1)
    result = zeros(BLOCK_P, BLOCK_C, LAST)
    first = 0
    for k in tl.static_range(GATES):
        du = _gradient(
            k, projected, gated, weight, first, split, channels, projected_strides, gated_strides, weight_strides,
            image, h, w, c, valid, GROUPS, COPIES, PRECISION, LAST, WIDE, BLOCK_P, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        at = image * gate_strides[0] + k * gate_strides[1] + h * gate_strides[2] + w * gate_strides[3]
        g, dl = _logit_gradient(sum_channels(x * du, LAST), grad_gate, gate, at, valid, RELU)
        if grad_logit is not None:
            dl = tl.load(grad_logit + at, mask=valid, other=0.0)
        row = tl.load(gate_weight + k * channels + c, mask=c < channels, other=0.0).to(tl.float32)
        result += by_pixel(g, LAST) * du + by_channel(row, LAST) * by_pixel(dl, LAST)
        tl.store(sums + k * channels + c, sum_pixels(x * by_pixel(dl, LAST), LAST), mask=c < channels)
        tl.store(sums + GATES * channels + k, tl.sum(dl), mask=block == 0)
        if k < GROUPS:
            first += split[k]
    at = image * grad_input_strides[0] + offsets(h, w, c, grad_input_strides, LAST)
    tl.store(grad_input + at, result.to(grad_input.dtype.element_ty), mask=mask)


def split_branch_backward(
    projected: Maps,
    gated: Maps,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor | None,
    *,
    relu: bool,
    grad_input: Tensor,
    grad_gate_weight: Tensor,
    grad_gate_bias: Tensor,
) -> None:
    """The gradients of input, gate_weight and gate_bias; ``projected`` and ``gated`` are the outputs' gradients."""
    channels = input.shape[1]
    pixels = merged(input, grad_input, gate, *projected, *gated)
    widest = max((z.shape[1] for z in projected), default=1)
    name = _kernel_name("gated_split_backward", weight)
    problem = configs.Problem(name, input.dtype, is_last(input), channels, widest, *pixels[:3], precision=precision())
    input_strides, grad_input_strides, gate_strides, *strides = pixels.strides
    strides = [tuple(strides[: len(projected)]), tuple(strides[len(projected) :])]
    weight_strides = None if weight is None else weight.stride()[:2]

    def run(config: configs.Config) -> Tensor:
        tiles = pixels.images * pixels.height * ceil_div(pixels.width, config.width)
        blocks = ceil_div(channels, config.channels)
        sums = torch.empty((tiles, gate.shape[1] * (channels + 1)), dtype=torch.float32, device=input.device)
        sizes = (channels, tuple(z.shape[1] for z in projected), pixels.height, pixels.width, weight_strides)
        constants = {
            "GATES": gate.shape[1],
            "GROUPS": len(projected),
            "COPIES": len(gated),
            "RELU": relu,
            "PRECISION": problem.precision,
            "LAST": problem.channels_last,
            "WIDE": is_wide(input, gate, grad_input, *projected, *gated),
            "BLOCK_P": config.width,
            "BLOCK_C": config.channels,
            "BLOCK_K": config.out_channels,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        maps = (tuple(projected), tuple(gated), grad_gate, input, gate)
        grad_logit = None
        if blocks > 1:
            grad_logit = torch.empty(gate.shape, dtype=torch.float32, device=input.device)
            launch(
                gated_split_dot_kernel,
                tiles,
                input.device,
                *maps,
                weight,
                grad_logit,
                *sizes,
                input_strides,
                gate_strides,
                *strides,
                **constants,
            )
        launch(
            gated_split_backward_kernel,
            tiles * blocks,
            input.device,
            *maps,
            gate_weight,
            weight,
            grad_logit,
            grad_input,
            sums,
            *sizes,
            input_strides,
            grad_input_strides,
            gate_strides,
            *strides,
            **constants,
        )
        return sums

    sum_rows(configs.run(problem, input.device, run), grad_gate_weight, grad_gate_bias)
