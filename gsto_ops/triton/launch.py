"""What the launchers share: the axes of a resampling, new tensors, strides, pixel axes merged where memory allows."""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.library import layout_of

CHUNK_BYTES = 16 << 20  # of a map between two passes: it is read again before L2 (40 MB and more) has lost it

Axis = tuple[int, int, float, float, int]  # see taps.py
Strides = tuple[int, ...]  # of (N, C, H, W)


class Resampling(NamedTuple):
    """ST of one call: its axes for the kernels, forward and transposed."""

    mode: str  # "identity" where it is a copy
    align_corners: bool
    rows: Axis
    cols: Axis
    rows_transposed: Axis
    cols_transposed: Axis

    @property
    def identity(self) -> bool:
        return self.mode == "identity"

    @property
    def shrinks(self) -> bool:
        return self.rows[1] * self.cols[1] < self.rows[0] * self.cols[0]

    @property
    def wide(self) -> bool:
        """Whether adaptive pooling's products of positions need 64 bits."""
        return self.mode == "avg" and any((a[0] + 1) * (a[1] + 1) >= 2**31 for a in (self.rows, self.cols))


def _step(inputs: int, outputs: int, align_corners: bool, scale: float | None) -> float:
    if align_corners:
        return (inputs - 1) / (outputs - 1) if outputs > 1 else 0.0
    return 1 / scale if scale else inputs / outputs


def _runs(inputs: int, outputs: int, mode: str, align_corners: bool, step: float) -> tuple[int, int]:
    """The longest run of taps and the longest run of readers along an axis."""
    if mode == "avg":
        o, i = np.arange(outputs, dtype=np.int64), np.arange(inputs, dtype=np.int64)
        taps = -(-(o + 1) * inputs // outputs) - o * inputs // outputs
        readers = -(-(i + 1) * outputs // inputs) - i * outputs // inputs
        return int(taps.max()), int(readers.max())
    position, single = np.arange(outputs, dtype=np.float32), np.float32(step)
    if mode == "nearest":
        start = np.minimum((position * single).astype(np.int64), inputs - 1)
        return 1, int(np.bincount(start).max())
    if not align_corners:
        position = np.maximum((position + np.float32(0.5)) * single - np.float32(0.5), 0)
    else:
        position = position * single
    start = np.bincount(np.minimum(position.astype(np.int64), inputs - 1), minlength=inputs)
    run = start.copy()
    run[1:] += start[:-1]
    # One more where a GPU's rounding may move an output that falls between two inputs.
    return 2, int(run.max()) + (not float(step * 1024).is_integer())


@lru_cache(maxsize=4096)
def _axes(inputs: int, outputs: int, mode: str, align_corners: bool, scale: float | None) -> tuple[Axis, Axis]:
    if mode == "identity" or (mode == "bilinear" and inputs == outputs):
        return (inputs, outputs, 1.0, 1.0, 1), (inputs, outputs, 1.0, 1.0, 2 if mode == "bilinear" else 1)
    step = _step(inputs, outputs, align_corners, scale)
    inverse = 1 / step if step > 0 else 0.0
    taps, readers = _runs(inputs, outputs, mode, align_corners, step)
    return (inputs, outputs, step, inverse, taps), (inputs, outputs, step, inverse, readers)


@lru_cache(maxsize=4096)
def resampling(
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    mode: str,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> Resampling:
    scales = (scale_h, scale_w) if scale_h and scale_w else (None, None)
    align_corners = align_corners and mode == "bilinear"
    if in_size == out_size and (mode != "nearest" or scales in ((None, None), (1.0, 1.0))):
        mode = "identity"
    axes = [_axes(i, o, mode, align_corners, s) for i, o, s in zip(in_size, out_size, scales, strict=True)]
    (rows, rows_transposed), (cols, cols_transposed) = axes
    return Resampling(mode, align_corners, rows, cols, rows_transposed, cols_transposed)


def identity(size: Sequence[int]) -> Resampling:
    return resampling((size[0], size[1]), (size[0], size[1]), "avg", False, None, None)


def new_map(input: Tensor, channels: int, height: int, width: int, images: int | None = None) -> Tensor:
    """An empty map in the layout of ``input``, with the strides that the fake kernels give (gsto_ops.ops.library)."""
    shape = (input.shape[0] if images is None else images, channels, height, width)
    # A contiguous map of one channel or one pixel is channels_last already, and keeps its strides.
    layout = layout_of(input) if channels != 1 and height * width != 1 else torch.contiguous_format
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)


def is_last(input: Tensor) -> bool:
    """Whether tiles are laid out for channels_last."""
    return layout_of(input) == torch.channels_last


def is_wide(*maps: Tensor) -> bool:
    """Whether an offset inside one image exceeds 32 bits."""
    return any(sum((n - 1) * s for n, s in zip(m.shape[1:], m.stride()[1:], strict=True)) >= 2**31 for m in maps)


class Pixels(NamedTuple):
    """Maps of one size as (images, channels, height, width) for kernels that treat every pixel alike."""

    images: int
    height: int
    width: int
    strides: list[Strides]  # of every map


def merged(*maps: Tensor) -> Pixels:
    """Rows become one long row, and images too, where the strides of all maps allow: fewer partial tiles."""
    images, _, height, width = maps[0].shape
    strides = [m.stride() for m in maps]
    if height == 1 or all(s[2] == width * s[3] for s in strides):
        height, width = 1, height * width
        strides = [(s[0], s[1], 0, s[3]) for s in strides]
        # Offsets along the merged row are 32 bits wide in the kernels.
        small = all(images * width * s[3] < 2**31 for s in strides)
        if small and (images == 1 or all(s[0] == width * s[3] for s in strides)):
            images, width = min(images, 1), images * width
    return Pixels(images, height, width, strides)


def folded(*maps: Tensor) -> tuple[int, Pixels]:
    """(k, merged maps) with k pixels side by side as one of k C channels: a multiple of 64 where the number of pixels allows.

    Only for dense channels_last maps that are alike; k is 1 for others.
    """
    pixels, channels = merged(*maps), maps[0].shape[1]
    fold = 64 // math.gcd(channels, 64)
    alike = all(
        m.shape[1] == channels and s[1] == 1 and s[3] == channels for m, s in zip(maps, pixels.strides, strict=True)
    )
    if pixels.height > 1 or channels == 1 or not alike:
        return 1, pixels
    while pixels.width % fold:
        fold //= 2
    strides = [(s[0], 1, 0, fold * channels) for s in pixels.strides]
    return fold, Pixels(pixels.images, 1, pixels.width // fold, strides)


def precision() -> str:
    """How float32 products are done: as torch does those of matrices."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """Runs ``programs`` programs of a kernel on the tensors' device; none is legal (an empty batch)."""
    if programs == 0:
        return
    guard: Callable = torch.cuda.device if device.type == "cuda" else contextlib.nullcontext
    with guard(device):
        kernel[(programs,)](*args, **constants)


def images_per_chunk(batch: int, bytes_per_image: int) -> int:
    return min(max(1, CHUNK_BYTES // max(1, bytes_per_image)), max(1, batch))
