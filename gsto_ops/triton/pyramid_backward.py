"""The way back of pooling over large windows (pyramid.py): the gates' logits with their sums first, then the map's gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import ceil_div, is_last, is_wide, launch, precision
from .pyramid import Levels, inside_windows, inverse_size, load_image, load_windows, windows_of
from .reduce import sum_rows
from .taps import by_channel, by_pixel, indices, load_matrix, multiply, zeros


# Traffic: x once from DRAM (again from L2, for the sums), K gates, K dl written, the pooled map's gradient from L2, and
# K (C + 1) floats of sums per tile.
@triton.jit(do_not_specialize=["height", "bins"])
def pyramid_logits_kernel(
    grad_pooled,
    grad_gate,
    input,
    gate,
    dlogits,
    sums,
    channels,
    height,
    width,
    bins,
    windows,
    grad_strides,
    input_strides,
    LEVELS: tl.constexpr,
    LEVELS_BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dl_k = (du_k . x + grad_gate_k) g_k (1 - g_k), and per tile the sums of dl_k x and of dl_k."""
    pixels = height * width
    tiles = tl.cdiv(pixels, BLOCK_P)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    p = indices(tl.program_id(0) % tiles * BLOCK_P, BLOCK_P, WIDE)
    h = p // width
    w = p % width
    valid = p < pixels
    grad_pooled += image * grad_strides[0]
    input += image * input_strides[0]
    gate += image * LEVELS * pixels
    dlogits += image * LEVELS * pixels
    k_index = tl.arange(0, LEVELS_BLOCK)
    dots = zeros(BLOCK_P, LEVELS_BLOCK, LAST)
    for b0 in range(0, bins, BLOCK_B):
        b = indices(b0, BLOCK_B, WIDE)
        level, h0, h1, w0, w1 = load_windows(windows, b, bins)
        inside = inside_windows(h, w, valid, h0, h1, w0, w1, LAST)
        # Blocks of bins that no pixel of the tile lies in cost no product.
        needed = tl.max(inside.to(tl.int32)) * channels
        products = zeros(BLOCK_P, BLOCK_B, LAST)
        for c0 in range(0, needed, BLOCK_C):
            c = indices(c0, BLOCK_C, WIDE)
            x = load_image(input, p, h, w, valid, c, channels, input_strides, FLAT, LAST)
            matrix = load_matrix(grad_pooled, c, b, channels, bins, grad_strides[1], grad_strides[2], LAST)
            products = multiply(x, matrix, products, LAST, PRECISION)
        products = tl.where(inside, products * by_channel(inverse_size(h0, h1, w0, w1), LAST), 0.0)
        of_level = (by_pixel(level, LAST) == by_channel(k_index, LAST)).to(tl.float32)
        of_level = of_level.to(input.dtype.element_ty)
        dots = multiply(products.to(input.dtype.element_ty), of_level, dots, LAST, PRECISION)
    at = by_channel(k_index.to(p.dtype) * pixels, LAST) + by_pixel(p, LAST)
    mask = by_channel(k_index < LEVELS, LAST) & by_pixel(valid, LAST)
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    if grad_gate is not None:
        dots += tl.load(grad_gate + image * LEVELS * pixels + at, mask=mask, other=0.0).to(tl.float32)
    dlogit = dots * g * (1 - g)
    tl.store(dlogits + at, dlogit, mask=mask)
    sums += tl.program_id(0).to(tl.int64) * LEVELS * (channels + 1)
    if LAST:
        total = tl.sum(dlogit, 0)
    else:
        total = tl.sum(dlogit, 1)
    tl.store(sums + LEVELS * channels + k_index, total, mask=k_index < LEVELS)
    rounded = dlogit.to(input.dtype.element_ty)
    for c0 in range(0, channels, BLOCK_C):
        c = indices(c0, BLOCK_C, WIDE)
        x = load_image(input, p, h, w, valid, c, channels, input_strides, FLAT, LAST)
        if LAST:
            part = tl.dot(tl.trans(rounded), x, input_precision=PRECISION)
        else:
            part = tl.dot(rounded, tl.trans(x), input_precision=PRECISION)
        tl.store(
            sums + k_index[:, None] * channels + c[None, :],
            part,
            mask=(k_index < LEVELS)[:, None] & (c < channels)[None, :],
        )


# Traffic: K gates and K dl per block of channels, dx once; the pooled map's gradient stays in L2.
@triton.jit(do_not_specialize=["height", "bins"])
def pyramid_grad_input_kernel(
    grad_pooled,
    gate,
    gate_weight,
    dlogits,
    grad_input,
    channels,
    height,
    width,
    bins,
    windows,
    grad_strides,
    grad_input_strides,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = sum over k of g_k du_k + rho_k dl_k."""
    pixels = height * width
    blocks = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(pixels, BLOCK_P)
    tile = tl.program_id(0) // blocks
    c = indices(tl.program_id(0) % blocks * BLOCK_C, BLOCK_C, WIDE)
    image = (tile // tiles).to(tl.int64)
    p = indices(tile % tiles * BLOCK_P, BLOCK_P, WIDE)
    h = p // width
    w = p % width
    valid = p < pixels
    grad_pooled += image * grad_strides[0]
    gate += image * LEVELS * pixels
    dlogits += image * LEVELS * pixels
    result = zeros(BLOCK_P, BLOCK_C, LAST)
    for b0 in range(0, bins, BLOCK_B):
        b = indices(b0, BLOCK_B, WIDE)
        level, h0, h1, w0, w1 = load_windows(windows, b, bins)
        inside = inside_windows(h, w, valid, h0, h1, w0, w1, LAST)
        at = by_channel(level * pixels, LAST) + by_pixel(p, LAST)
        factor = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        factor *= by_channel(inverse_size(h0, h1, w0, w1), LAST)
        matrix = load_matrix(grad_pooled, b, c, bins, channels, grad_strides[2], grad_strides[1], LAST)
        result = multiply(factor.to(matrix.dtype), matrix, result, LAST, PRECISION)
    for k in tl.static_range(LEVELS):
        row = tl.load(gate_weight + k * channels + c, mask=c < channels, other=0.0).to(tl.float32)
        dlogit = tl.load(dlogits + k * pixels + p, mask=valid, other=0.0)
        result += by_pixel(dlogit, LAST) * by_channel(row, LAST)
    mask = by_pixel(valid, LAST) & by_channel(c < channels, LAST)
    # A fresh map is dense: its pixels have one stride.
    at = by_pixel(p * grad_input_strides[3], LAST) + by_channel(c * grad_input_strides[1], LAST)
    tl.store(grad_input + image * grad_input_strides[0] + at, result.to(grad_input.dtype.element_ty), mask=mask)


def pyramid_backward(
    grad_pooled: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    levels: Levels,
    grad_input: Tensor,
    grad_gate_weight: Tensor,
    grad_gate_bias: Tensor,
) -> None:
    """The gradients of :func:`pool` of gates and map: two kernels over the map, one reading it, one writing its gradient."""
    images, channels, height, width = input.shape
    bins = grad_pooled.shape[2]
    dlogits = torch.empty(gate.shape, dtype=torch.float32, device=input.device)
    wide = is_wide(input, gate)
    sizes = (channels, bins, images, height, width)
    problem = configs.Problem("pyramid_logits", input.dtype, is_last(input), *sizes, precision=precision(), tight=wide)
    windows = windows_of(levels, height, width, input.device)
    common = {
        "LEVELS": len(levels),
        "PRECISION": problem.precision,
        "LAST": problem.channels_last,
        "WIDE": wide,
    }

    def logits(config: configs.Config) -> Tensor:
        tiles = images * ceil_div(height * width, config.width)
        sums = torch.empty((tiles, len(levels) * (channels + 1)), dtype=torch.float32, device=input.device)
        launch(
            pyramid_logits_kernel,
            tiles,
            input.device,
            grad_pooled,
            grad_gate,
            input,
            gate,
            dlogits,
            sums,
            channels,
            height,
            width,
            bins,
            windows,
            grad_pooled.stride(),
            input.stride(),
            LEVELS_BLOCK=max(16, triton.next_power_of_2(len(levels))),
            FLAT=input.stride(2) == width * input.stride(3),
            BLOCK_P=config.width,
            BLOCK_B=config.out_channels,
            BLOCK_C=config.channels,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **common,
        )
        return sums

    def grads(config: configs.Config) -> None:
        launch(
            pyramid_grad_input_kernel,
            images * ceil_div(height * width, config.width) * ceil_div(channels, config.channels),
            input.device,
            grad_pooled,
            gate,
            gate_weight,
            dlogits,
            grad_input,
            channels,
            height,
            width,
            bins,
            windows,
            grad_pooled.stride(),
            grad_input.stride(),
            BLOCK_P=config.width,
            BLOCK_B=config.out_channels,
            BLOCK_C=config.channels,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **common,
        )

    sums = configs.run(problem, input.device, logits)
    configs.run(problem._replace(kernel="pyramid_grad_input"), input.device, grads)
    sum_rows(sums, grad_gate_weight, grad_gate_bias)
