"""Device helpers of all kernels: tiles of pixels and channels, and the taps of separable resampling as arithmetic on one axis.

A tile is [pixels, channels] for channels_last maps and [channels, pixels] otherwise (``LAST``): the axis of unit stride comes
last, which is how Triton orders its accesses where it cannot prove contiguity.

An axis is a tuple (inputs, outputs, step, 1 / step, run): ``step`` in inputs per output, ``run`` the longest run of taps of one
output (transposed: of readers of one input). Every output reads a contiguous run of inputs, and the runs move monotonely with
the output; so the outputs that read one input are a contiguous run too: the gather form of the transpose.
"""

import triton
import triton.language as tl


@triton.jit
def by_pixel(v, LAST: tl.constexpr):
    """A vector over the tile's pixels, to broadcast over its channels."""
    if LAST:
        return v[:, None]
    else:
        return v[None, :]


@triton.jit
def by_channel(v, LAST: tl.constexpr):
    if LAST:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def zeros(PIXELS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    if LAST:
        return tl.zeros((PIXELS, CHANNELS), tl.float32)
    else:
        return tl.zeros((CHANNELS, PIXELS), tl.float32)


@triton.jit
def sum_channels(tile, LAST: tl.constexpr):
    return tl.sum(tile, 1 if LAST else 0)


@triton.jit
def sum_pixels(tile, LAST: tl.constexpr):
    return tl.sum(tile, 0 if LAST else 1)


@triton.jit
def multiply(tile, matrix, acc, LAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + the tile's channels times the matrix of :func:`load_matrix`."""
    if LAST:
        return tl.dot(tile, matrix, acc, input_precision=PRECISION)
    else:
        return tl.dot(matrix, tile, acc, input_precision=PRECISION)


@triton.jit
def load_matrix(pointer, k, n, k_size, n_size, k_stride, n_stride, LAST: tl.constexpr):
    """The (k, n) part of a matrix, as :func:`multiply` needs it: [k, n], or [n, k] for tiles that are not channels_last."""
    mask = by_pixel(k < k_size, LAST) & by_channel(n < n_size, LAST)
    return tl.load(pointer + by_pixel(k * k_stride, LAST) + by_channel(n * n_stride, LAST), mask=mask, other=0.0)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)  # keeps NaN, as torch's does


@triton.jit
def indices(start, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """start ... start + SIZE - 1, in 64 bits where the offsets inside one image need them."""
    i = start + tl.arange(0, SIZE)
    if WIDE:
        i = i.to(tl.int64)
    return i


@triton.jit
def pixel_tile(tile, height, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, WIDE: tl.constexpr):
    """(image, rows, columns, validity) of the pixels of a tile; rows and columns have BLOCK_H * BLOCK_W elements."""
    tiles_w = tl.cdiv(width, BLOCK_W)
    tiles_h = tl.cdiv(height, BLOCK_H)
    h0 = tile // tiles_w % tiles_h * BLOCK_H
    w0 = tile % tiles_w * BLOCK_W
    q = indices(0, BLOCK_H * BLOCK_W, WIDE)
    if BLOCK_H == 1:  # the columns' contiguity shows without division
        h = tl.zeros_like(q) + h0
        w = w0 + q
    else:
        h = h0 + q // BLOCK_W
        w = w0 + q % BLOCK_W
    image = (tile // (tiles_w * tiles_h)).to(tl.int64)
    return image, h, w, (h < height) & (w < width)


@triton.jit
def offsets(h, w, c, strides, LAST: tl.constexpr):
    """Offsets of a tile inside its image; ``strides`` are those of (N, C, H, W)."""
    return by_pixel(h * strides[2] + w * strides[3], LAST) + by_channel(c * strides[1], LAST)


@triton.jit
def bilinear_taps(output, axis, ALIGN: tl.constexpr):
    """(first input, weight of the next one): torch's rule, in float32 like torch's."""
    position = output.to(tl.float32) * axis[2]
    if not ALIGN:
        position = tl.maximum((output.to(tl.float32) + 0.5) * axis[2] - 0.5, 0.0)
    start = tl.minimum(position.to(output.dtype), axis[0] - 1)
    return start, tl.where(start < axis[0] - 1, position - start.to(tl.float32), 0.0)


@triton.jit
def nearest_tap(output, axis):
    return tl.minimum((output.to(tl.float32) * axis[2]).to(output.dtype), axis[0] - 1)


@triton.jit
def window(output, axis):
    """[first, end) of adaptive average pooling."""
    return output * axis[0] // axis[1], ((output + 1) * axis[0] + axis[1] - 1) // axis[1]


@triton.jit
def tap(output, r, axis, MODE: tl.constexpr, ALIGN: tl.constexpr):
    """The r-th input that an output reads, and its weight: zero behind the run's end."""
    if MODE == "avg":
        start, end = window(output, axis)
        return start + r, tl.where(start + r < end, 1.0 / (end - start).to(tl.float32), 0.0)
    elif MODE == "bilinear":
        start, weight = bilinear_taps(output, axis, ALIGN)
        return start + r, tl.where(r == 0, 1.0 - weight, weight)
    elif MODE == "nearest":
        start = nearest_tap(output, axis)
        return start, tl.where(start == start + r, 1.0, 0.0)
    else:
        return output, tl.where(output == output + r, 1.0, 0.0)


@triton.jit
def first_reader(input, axis, MODE: tl.constexpr, ALIGN: tl.constexpr):
    """The first output that reads an input (or the first behind it, where none does)."""
    if MODE == "avg":
        return input * axis[1] // axis[0]
    elif MODE == "bilinear":
        # An estimate that is never too large, then three steps of the exact rule.
        position = input.to(tl.float32) - 1.0
        if ALIGN:
            output = (position * axis[3]).to(input.dtype) - 1
        else:
            output = ((position + 0.5) * axis[3] - 0.5).to(input.dtype) - 1
        output = tl.maximum(output, 0)
        for _ in tl.static_range(3):
            start, _weight = bilinear_taps(output, axis, ALIGN)
            output += (start < input - 1).to(input.dtype)
        return output
    elif MODE == "nearest":
        output = tl.maximum((input.to(tl.float32) * axis[3]).to(input.dtype) - 1, 0)
        for _ in tl.static_range(3):
            output += (nearest_tap(output, axis) < input).to(input.dtype)
        return output
    else:
        return input


@triton.jit
def reader_weight(output, input, axis, MODE: tl.constexpr, ALIGN: tl.constexpr):
    """The weight of an input in an output; zero where the output does not read it or does not exist."""
    if MODE == "avg":
        start, end = window(output, axis)
        weight = tl.where((start <= input) & (input < end), 1.0 / (end - start).to(tl.float32), 0.0)
    elif MODE == "bilinear":
        start, second = bilinear_taps(output, axis, ALIGN)
        weight = tl.where(start == input, 1.0 - second, tl.where(start + 1 == input, second, 0.0))
    elif MODE == "nearest":
        weight = tl.where(nearest_tap(output, axis) == input, 1.0, 0.0)
    else:
        weight = tl.where(output == input, 1.0, 0.0)
    return tl.where(output < axis[1], weight, 0.0)
