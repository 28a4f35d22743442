"""The gradients of a branch of a gated fusion for its map and gates, from one read of the map and of the outputs' gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import ceil_div, is_last, is_wide, launch, merged, precision
from .reduce import sum_rows
from .split import Maps
from .taps import (
    by_channel,
    by_pixel,
    indices,
    load_matrix,
    multiply,
    offsets,
    pixel_tile,
    sum_channels,
    sum_pixels,
    zeros,
)


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
    name = "gated_split_backward_copies" if weight is None else "gated_split_backward"
    wide = is_wide(input, gate, grad_input, *projected, *gated)
    tight = wide or len(projected) > 2  # of three projections in NCHW, 128 bytes per thread do not fit with 64 pixels
    problem = configs.Problem(
        name, input.dtype, is_last(input), channels, widest, *pixels[:3], precision=precision(), tight=tight
    )
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
            "WIDE": wide,
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
