"""Batch norm backward: the masked gradient and its sums in one pass, the terms' gradients in the next.

``columns`` and ``channels`` are as in norm.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import ceil_div, is_last, is_wide, launch
from .norm import Maps, flat, ranges
from .reduce import sum_rows
from .taps import by_channel, by_pixel, indices, offsets, pixel_tile, sum_pixels, zeros


@triton.jit
def under_relu(grad, centred, variance, weight, bias, eps, channel, LAST: tl.constexpr):
    """The gradient where norm(term) > 0, by forward's formula; ``centred`` is the term less its mean."""
    scale = tl.load(weight + channel).to(tl.float32) * tl.rsqrt(variance + eps)
    shift = tl.load(bias + channel).to(tl.float32)
    return tl.where(centred * by_channel(scale, LAST) + by_channel(shift, LAST) > 0, grad, 0.0)


# Traffic: the gradient, the output (for its sign) and every term of its size once, the masked gradient written once: 2 (3 + T)
# bytes per element of 16-bit maps; 4 (1 + T) bytes per column and program of partial sums. Where the ReLU follows a single norm
# (weight, bias) it is made again from the term: no output is read, no masked gradient written, 4 bytes.
@triton.jit(do_not_specialize=["images", "height", "tiles_per_split"])
def batch_norm_sum_backward_kernel(
    grad_output,
    output,
    grad_sum,
    terms,
    means,
    variances,
    eps,
    weight,
    bias,
    sums,
    channels,
    columns,
    images,
    height,
    width,
    tiles_per_split,
    grad_output_strides,
    output_strides,
    grad_sum_strides,
    term_strides,
    SMALL: tl.constexpr,
    TERMS: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_sum = grad_output where output > 0; per range of pixel tiles its sums and those of grad_sum times the normed term_k.

    The sums of smaller terms are left zero.
    """
    blocks = tl.cdiv(columns, BLOCK_C)
    split = tl.program_id(0) // blocks
    c = indices(tl.program_id(0) % blocks * BLOCK_C, BLOCK_C, WIDE)
    channel = c % channels
    total = zeros(BLOCK_P, BLOCK_C, LAST)
    dots = ()
    for _ in tl.static_range(TERMS):
        dots += (zeros(BLOCK_P, BLOCK_C, LAST),)
    end = tl.minimum((split + 1) * tiles_per_split, images * height * tl.cdiv(width, BLOCK_P))
    for tile in range(split * tiles_per_split, end):
        image, h, w, valid = pixel_tile(tile, height, width, 1, BLOCK_P, WIDE)
        mask = by_pixel(valid, LAST) & by_channel(c < columns, LAST)
        at = image * grad_output_strides[0] + offsets(h, w, c, grad_output_strides, LAST)
        grad = tl.load(grad_output + at, mask=mask, other=0.0)
        if output is not None:
            at = image * output_strides[0] + offsets(h, w, c, output_strides, LAST)
            grad = tl.where(tl.load(output + at, mask=mask, other=0.0) > 0, grad, 0.0)
            at = image * grad_sum_strides[0] + offsets(h, w, c, grad_sum_strides, LAST)
            tl.store(grad_sum + at, grad, mask=mask)
        grad = grad.to(tl.float32)
        products = ()
        for k in tl.static_range(TERMS):
            product = dots[k]
            if not SMALL[k]:
                at = image * term_strides[k][0] + offsets(h, w, c, term_strides[k], LAST)
                value = tl.load(terms[k] + at, mask=mask, other=0.0).to(tl.float32)
                value -= by_channel(tl.load(means[k] + channel), LAST)
                if bias is not None:
                    variance = tl.load(variances[k] + channel)
                    grad = under_relu(grad, value, variance, weight, bias, eps[k], channel, LAST)
                product += grad * value
            products += (product,)
        dots = products
        total += grad
    # Rows of (1 + T) C sums, one per range and pixel side by side.
    at = (split.to(tl.int64) * (columns // channels) + c // channels) * (1 + TERMS) * channels + channel
    tl.store(sums + at, sum_pixels(total, LAST), mask=c < columns)
    for k in tl.static_range(TERMS):
        inverse = tl.rsqrt(tl.load(variances[k] + channel) + eps[k])
        tl.store(sums + at + (k + 1) * channels, sum_pixels(dots[k], LAST) * inverse, mask=c < columns)


def masked_sums(
    grad_output: Tensor,
    output: Tensor | None,
    grad_sum: Tensor | None,
    terms: Maps,
    statistics: Sequence[Maps],
    eps: Sequence[float],
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """grad_sum = grad_output where output > 0; sums (1 + T, C) its sums and, for terms of its size, with the normed term_k.

    ``statistics``: the terms' means and variances. ``weight``, ``bias``: of a single term whose norm with ReLU is the output.
    """
    maps = (grad_output, output, grad_sum, *terms)
    small = tuple(term.shape[2:] != grad_output.shape[2:] for term in terms)
    fold, pixels, strides = flat([None if m is None or m.shape[2:] != grad_output.shape[2:] else m for m in maps])
    channels = grad_output.shape[1]
    columns = fold * channels
    last = is_last(terms[0] if bias is not None else grad_output if output is None else output)
    problem = configs.Problem(
        "batch_norm_sum_backward", grad_output.dtype, last, columns, columns, *pixels[:3], precision="ieee"
    )

    def run(config: configs.Config) -> Tensor:
        per_split, splits, blocks = ranges(problem, config, grad_output.device)
        partial = torch.empty((splits * fold, sums.numel()), dtype=torch.float32, device=grad_output.device)
        launch(
            batch_norm_sum_backward_kernel,
            splits * blocks,
            grad_output.device,
            grad_output,
            output,
            grad_sum,
            tuple(terms),
            *(tuple(vectors) for vectors in statistics),
            tuple(eps),
            weight,
            bias,
            partial,
            channels,
            columns,
            *pixels[:3],
            per_split,
            *strides[:3],
            tuple(strides[3:]),
            SMALL=small,
            TERMS=len(terms),
            LAST=last,
            WIDE=is_wide(*(m for m in maps if m is not None)),
            BLOCK_P=config.width,
            BLOCK_C=config.channels,
            num_warps=config.num_warps,
        )
        return partial

    sum_rows(configs.run(problem, grad_output.device, run), sums)


# Traffic: the gradient once, every term read and its gradient written once: 2 (1 + 2 T) bytes per element of 16-bit maps; without
# statistics' gradients (sums None) the terms are not read.
@triton.jit(do_not_specialize=["height"])
def batch_norm_sum_backward_terms_kernel(
    grad,
    terms,
    means,
    variances,
    weights,
    eps,
    sums,
    counts,
    bias,
    inverse_count,
    grads,
    channels,
    columns,
    height,
    width,
    grad_strides,
    strides,
    INDEX: tl.constexpr,
    TERMS: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_k = scale_k (grad - mean of grad - normed term_k * mean of grad times it).

    ``INDEX``: the places of these terms among all, for ``sums`` and ``counts``.
    """
    blocks = tl.cdiv(columns, BLOCK_C)
    image, h, w, valid = pixel_tile(tl.program_id(0) // blocks, height, width, 1, BLOCK_P, WIDE)
    c = indices(tl.program_id(0) % blocks * BLOCK_C, BLOCK_C, WIDE)
    channel = c % channels
    mask = by_pixel(valid, LAST) & by_channel(c < columns, LAST)
    at = image * grad_strides[0] + offsets(h, w, c, grad_strides, LAST)
    given = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(TERMS):
        inverse = tl.rsqrt(tl.load(variances[k] + channel) + eps[k])
        scale = tl.load(weights[k] + channel).to(tl.float32) * inverse
        result = given
        value = given
        if (sums is not None) or (bias is not None):
            at = image * strides[k][0] + offsets(h, w, c, strides[k], LAST)
            value = tl.load(terms[k] + at, mask=mask, other=0.0).to(tl.float32)
            value -= by_channel(tl.load(means[k] + channel), LAST)
        if bias is not None:
            result = under_relu(given, value, tl.load(variances[k] + channel), weights[k], bias, eps[k], channel, LAST)
        if sums is not None:
            share = inverse_count
            if counts is not None:
                share = 1.0 / tl.load(counts + INDEX[k]).to(tl.float32)
            slope = tl.load(sums + (1 + INDEX[k]) * channels + channel) * inverse * share
            result = result - by_channel(tl.load(sums + channel) * share, LAST) - by_channel(slope, LAST) * value
        result *= by_channel(scale, LAST)
        at = image * strides[TERMS + k][0] + offsets(h, w, c, strides[TERMS + k], LAST)
        tl.store(grads[k] + at, result.to(grads[k].dtype.element_ty), mask=mask)


def terms_backward(
    grad: Tensor,
    terms: Maps,
    norms: Sequence[Maps],
    eps: Sequence[float],
    sums: Tensor | None,
    counts: Tensor | None,
    index: Sequence[int],
    grads: Maps,
    bias: Tensor | None,
) -> None:
    """The gradients of terms that share ``grad``; ``norms``: their means, variances, weights. ``index``: see the kernel.

    ``bias``: of a single term's norm, with ReLU behind it, ``grad`` being the gradient behind that.
    """
    fold, pixels, (grad_strides, *strides) = flat([grad, *terms, *grads])
    channels = grad.shape[1]
    columns = fold * channels
    last = is_last(grads[0])
    problem = configs.Problem(
        "batch_norm_sum_backward_terms", grad.dtype, last, columns, columns, *pixels[:3], precision="ieee"
    )

    def run(config: configs.Config) -> None:
        tiles = pixels.images * pixels.height * ceil_div(pixels.width, config.width)
        launch(
            batch_norm_sum_backward_terms_kernel,
            tiles * ceil_div(columns, config.channels),
            grad.device,
            grad,
            tuple(terms),
            *(tuple(vectors) for vectors in norms),
            tuple(eps),
            sums,
            counts,
            bias,
            1 / max(1, grad.numel() // channels),
            tuple(grads),
            channels,
            columns,
            pixels.height,
            pixels.width,
            grad_strides,
            tuple(strides),
            INDEX=tuple(index),
            TERMS=len(terms),
            LAST=last,
            WIDE=is_wide(grad, *terms, *grads),
            BLOCK_P=config.width,
            BLOCK_C=config.channels,
            num_warps=config.num_warps,
        )

    configs.run(problem, grad.device, run)
