"""The cases of the kernel benchmarks: an operator, the same steps in eager PyTorch, and the shapes of their operands.

The shapes are those of HRNet-W18 and W48 at 512x1024 crops, N = 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gsto_ops

Function = Callable[..., tuple[Tensor, ...]]


@dataclass
class Case:
    """Two functions of the same operands. float32 lists the operands that stay float32 whatever the map's dtype."""

    name: str
    ours: Function
    eager: Function
    shapes: Sequence[tuple[int, ...]]  # of the operands; the first ones are maps
    float32: Sequence[int] = ()
    other_bytes: int = 0  # per image, that the function reads beside its operands
    multiply_adds: int = 0  # of the forward pass's product
    maps: int = 1


def resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.adaptive_avg_pool2d(x, size) if mode == "avg" else F.interpolate(x, size=size, mode=mode)


def transfer(name: str, channels: int, out: int | None, size: tuple[int, int], to: tuple[int, int], relu=False) -> Case:
    """gated_scale_transfer; with ``relu`` in its folded-BN inference form."""
    mode = "avg" if to[0] < size[0] else "bilinear"
    activation = "relu" if relu else None

    def ours(x: Tensor, gate_weight: Tensor, weight: Tensor | None = None, bias: Tensor | None = None):
        options = {"activation": activation} if relu else {}
        return (gsto_ops.gated_scale_transfer(x, gate_weight, None, weight, bias, size=to, mode=mode, **options),)

    def eager(x: Tensor, gate_weight: Tensor, weight: Tensor | None = None, bias: Tensor | None = None):
        y = torch.sigmoid(F.conv2d(x, gate_weight)) * x
        if weight is not None:
            y = F.conv2d(y, weight, bias)
        return (resize(y.relu() if relu else y, to, mode),)

    shapes = [(1, channels, *size), (1, channels, 1, 1)]
    if out:
        shapes += [(out, channels, 1, 1), (out,)]
    # Without an activation the product may run where there are fewer pixels.
    pixels = math.prod(size) if relu else min(math.prod(size), math.prod(to))
    label = f"gated_scale_transfer{' relu' if relu else ''}: {name}"
    return Case(label, ours, eager, shapes, multiply_adds=channels * (out or 0) * pixels)


def projection(name: str, channels: int, out: int, size: tuple[int, int]) -> Case:
    """gated_projection; eager takes the statistics that a batch norm needs."""

    def eager(x: Tensor, gate_weight: Tensor, weight: Tensor):
        gate = torch.sigmoid(F.conv2d(x, gate_weight))
        z = F.conv2d(gate * x, weight)
        var, mean = torch.var_mean(z.float() if x.dtype == torch.bfloat16 else z, (0, 2, 3), correction=0)
        return z, gate, mean, var

    def ours(x: Tensor, gate_weight: Tensor, weight: Tensor):
        return gsto_ops.gated_projection(x, gate_weight, None, weight)

    shapes = [(1, channels, *size), (1, channels, 1, 1), (out, channels, 1, 1)]
    return Case(f"gated_projection: {name}", ours, eager, shapes, multiply_adds=channels * out * math.prod(size))


def affine(name: str, channels: int, size: tuple[int, int], to: tuple[int, int], relu=False) -> Case:
    """affine_scale_transfer; eager runs a batch norm in eval mode."""
    mode = "avg" if to[0] < size[0] else "bilinear"

    def ours(x: Tensor, scale: Tensor, shift: Tensor):
        activation = "relu" if relu else None
        return (gsto_ops.affine_scale_transfer(x, scale, shift, activation=activation, size=to, mode=mode),)

    def eager(x: Tensor, scale: Tensor, shift: Tensor):
        y = F.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, eps=0.0)
        return (resize(y.relu() if relu else y, to, mode),)

    shapes = [(1, channels, *size), (channels,), (channels,)]
    return Case(f"affine_scale_transfer{' relu' if relu else ''}: {name}", ours, eager, shapes, float32=(1, 2))


def training(name: str, channels: int, out: int, size: tuple[int, int], to: tuple[int, int], relu=False) -> Case:
    """A projection with a batch norm in training mode: gated_projection, then affine_scale_transfer."""
    mode = "avg" if to[0] < size[0] else "bilinear"

    def ours(x: Tensor, gate_weight: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor):
        z, _, mean, var = gsto_ops.gated_projection(x, gate_weight, None, weight)
        scale = norm_weight * (var + 1e-5).rsqrt()
        shift = norm_bias - mean * scale
        activation = "relu" if relu else None
        return (gsto_ops.affine_scale_transfer(z, scale, shift, activation=activation, size=to, mode=mode),)

    def eager(x: Tensor, gate_weight: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor):
        z = F.conv2d(torch.sigmoid(F.conv2d(x, gate_weight)) * x, weight)
        y = F.batch_norm(z, None, None, norm_weight, norm_bias, training=True)
        return (resize(y.relu() if relu else y, to, mode),)

    shapes = [(1, channels, *size), (1, channels, 1, 1), (out, channels, 1, 1), (out,), (out,)]
    label = f"gated_projection + affine_scale_transfer{' relu' if relu else ''}: {name}"
    return Case(label, ours, eager, shapes, (3, 4), multiply_adds=channels * out * math.prod(size))


def pyramid(name: str, channels: int, size: tuple[int, int], bins: Sequence[int] = (1, 2, 3, 6)) -> Case:
    """gated_pyramid_pool; eager makes all gates in one convolution."""

    def ours(x: Tensor, gate_weight: Tensor, gate_bias: Tensor):
        pooled, _ = gsto_ops.gated_pyramid_pool(x, gate_weight, gate_bias, bins=list(bins))
        return tuple(pooled)

    def eager(x: Tensor, gate_weight: Tensor, gate_bias: Tensor):
        gate = torch.sigmoid(F.conv2d(x, gate_weight, gate_bias))
        return tuple(F.adaptive_avg_pool2d(gate[:, k : k + 1] * x, b) for k, b in enumerate(bins))

    shapes = [(1, channels, *size), (len(bins), channels, 1, 1), (len(bins),)]
    return Case(f"gated_pyramid_pool: {name}", ours, eager, shapes)


def cross_entropy(name: str, classes: int, size: tuple[int, int], to: tuple[int, int]) -> Case:
    """upsample_cross_entropy; a tenth of the labels are ignored."""

    @cache
    def target_of(images: int, device: torch.device) -> Tensor:
        target = torch.randint(0, classes, (images, *to), generator=torch.Generator().manual_seed(0))
        target[:, : to[0] // 10] = 255
        return target.to(device)

    def ours(x: Tensor):
        return (gsto_ops.upsample_cross_entropy(x, target_of(len(x), x.device), ignore_index=255),)

    def eager(x: Tensor):
        logits = x if x.dtype == torch.float64 else x.float()
        logits = F.interpolate(logits, size=to, mode="bilinear")
        return (F.cross_entropy(logits, target_of(len(x), x.device), ignore_index=255),)

    name = f"upsample_cross_entropy: {name}"
    return Case(name, ours, eager, [(1, classes, *size)], other_bytes=8 * to[0] * to[1])


def operators_of(x: Tensor) -> Any:
    """The operators of the backend in use."""
    return torch.ops.gsto_triton if gsto_ops.backends.select(x.device, x.dtype) == "triton" else torch.ops.gsto_ops


def norm_sum(
    name: str, channels: int, size: tuple[int, int], terms: Sequence[tuple[int, int]], residual: bool = False
) -> Case:
    """batch_norm_sum in training mode, its statistics included: relu([x +] the sum of the terms' upsampled batch norms)."""
    maps = [size] * residual + list(terms)

    def split(operands: tuple[Tensor, ...]) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]]:
        given, norms = list(operands[: len(maps)]), list(operands[len(maps) :])
        return given.pop(0) if residual else None, given, norms[: len(terms)], norms[len(terms) :]

    def ours(*operands: Tensor):
        x, given, weight, bias = split(operands)
        ops = operators_of(operands[0])
        mean, var = map(list, zip(*(ops.channel_statistics(term.detach()) for term in given), strict=True))
        norms = (mean, var, weight, bias, [1e-5] * len(terms), True, None, None)
        return (ops.batch_norm_sum(x, None, given, *norms, "relu", "bilinear", False),)

    def eager(*operands: Tensor):
        x, given, weight, bias = split(operands)
        parts = [] if x is None else [x]
        for term, gamma, beta in zip(given, weight, bias, strict=True):
            parts.append(resize(F.batch_norm(term, None, None, gamma, beta, training=True), size, "bilinear"))
        return (sum(parts[1:], parts[0]).relu(),)

    shapes = [(1, channels, *map_size) for map_size in maps] + [(channels,)] * (2 * len(terms))
    float32 = range(len(maps), len(shapes))
    return Case(f"batch_norm_sum relu: {name}", ours, eager, shapes, float32, maps=len(maps))


def split(name: str, channels: int, size: tuple[int, int], projections: Sequence[int], copies: int) -> Case:
    """gated_split of a branch; eager takes the statistics, too."""
    gates = len(projections) + copies

    def ours(x: Tensor, gate_weight: Tensor, *weight: Tensor):
        ops, matrix = operators_of(x), weight[0] if weight else None
        projected, gated, _, _, _ = ops.gated_split(x, gate_weight, None, matrix, list(projections), copies, "none")
        return *projected, *gated

    def eager(x: Tensor, gate_weight: Tensor, *weight: Tensor):
        each = torch.sigmoid(F.conv2d(x, gate_weight)).split(1, 1)
        blocks = weight[0].split(list(projections)) if weight else ()
        projected = [F.conv2d(gate * x, block) for gate, block in zip(each, blocks, strict=False)]
        for z in projected:
            torch.var_mean(z.detach(), (0, 2, 3), correction=0)
        return *projected, *(gate * x for gate in each[len(projections) :])

    shapes = [(1, channels, *size), (gates, channels, 1, 1)]
    shapes += [(sum(projections), channels, 1, 1)] if projections else []
    return Case(
        f"gated_split: {name}", ours, eager, shapes, multiply_adds=channels * sum(projections) * math.prod(size)
    )


CASES = [
    # The gated fusion module's transfers between branches (batch norm folded).
    transfer("up2 96 -> 48, 64x128", 96, 48, (64, 128), (128, 256)),
    transfer("up4 192 -> 48, 32x64", 192, 48, (32, 64), (128, 256)),
    transfer("up8 384 -> 48, 16x32", 384, 48, (16, 32), (128, 256)),
    transfer("up2 384 -> 192, 16x32", 384, 192, (16, 32), (32, 64)),
    transfer("up2 36 -> 18, 64x128", 36, 18, (64, 128), (128, 256)),
    transfer("up4 72 -> 18, 32x64", 72, 18, (32, 64), (128, 256)),
    transfer("up8 144 -> 18, 16x32", 144, 18, (16, 32), (128, 256)),
    transfer("same size, 48, 128x256", 48, None, (128, 256), (128, 256)),
    transfer("same size, 384, 16x32", 384, None, (16, 32), (16, 32)),
    transfer("same size, 18, 128x256", 18, None, (128, 256), (128, 256)),
    # The paper-literal gated transition: from the concatenated branches to a new one, and pooling as such.
    transfer("down4 144 -> 192, 128x256", 144, 192, (128, 256), (32, 64), relu=True),
    transfer("down4 54 -> 72, 128x256", 54, 72, (128, 256), (32, 64), relu=True),
    transfer("up2 96 -> 48, 64x128", 96, 48, (64, 128), (128, 256), relu=True),
    transfer("down2 48 -> 96, 128x256", 48, 96, (128, 256), (64, 128)),
    transfer("down2 18 -> 36, 128x256", 18, 36, (128, 256), (64, 128)),
    # The same in training.
    projection("96 -> 48, 64x128", 96, 48, (64, 128)),
    projection("384 -> 48, 16x32", 384, 48, (16, 32)),
    projection("36 -> 18, 64x128", 36, 18, (64, 128)),
    projection("144 -> 192, 128x256", 144, 192, (128, 256)),
    affine("up2 48, 64x128", 48, (64, 128), (128, 256)),
    affine("up8 48, 16x32", 48, (16, 32), (128, 256)),
    affine("up2 18, 64x128", 18, (64, 128), (128, 256)),
    affine("down4 192, 128x256", 192, (128, 256), (32, 64), relu=True),
    affine("same size, 48, 128x256", 48, (128, 256), (128, 256), relu=True),
    training("up2 96 -> 48, 64x128", 96, 48, (64, 128), (128, 256)),
    training("up8 384 -> 48, 16x32", 384, 48, (16, 32), (128, 256)),
    training("up2 36 -> 18, 64x128", 36, 18, (64, 128), (128, 256)),
    training("down4 144 -> 192, 128x256", 144, 192, (128, 256), (32, 64), relu=True),
    pyramid("W48, 720, 128x256", 720, (128, 256)),
    pyramid("W18, 270, 128x256", 270, (128, 256)),
    pyramid("ResNet-50, 2048, 64x128", 2048, (64, 128)),
    # The loss of one head.
    cross_entropy("19 classes, 128x256 -> 512x1024", 19, (128, 256), (512, 1024)),
    cross_entropy("60 classes, 120x120 -> 480x480", 60, (120, 120), (480, 480)),
    # The ends of residual blocks and of the gated fusion modules in training, and what leaves their branches.
    norm_sum("norm, 48, 128x256", 48, (128, 256), [(128, 256)]),
    norm_sum("norm, 18, 128x256", 18, (128, 256), [(128, 256)]),
    norm_sum("norm + x, 48, 128x256", 48, (128, 256), [(128, 256)], residual=True),
    norm_sum("norm + x, 384, 16x32", 384, (16, 32), [(16, 32)], residual=True),
    norm_sum("fusion of 4, 48, 128x256", 48, (128, 256), [(64, 128), (32, 64), (16, 32)], residual=True),
    norm_sum("fusion of 4, 18, 128x256", 18, (128, 256), [(64, 128), (32, 64), (16, 32)], residual=True),
    norm_sum("fusion of 4, 192, 32x64", 192, (32, 64), [(32, 64), (32, 64), (16, 32)], residual=True),
    split("branch 0 of 4, 48, 128x256", 48, (128, 256), [], 4),
    split("branch 1 of 4, 96, 64x128", 96, (64, 128), [48], 3),
    split("branch 3 of 4, 384, 16x32", 384, (16, 32), [48, 96, 192], 1),
    split("branch 1 of 4, 36, 64x128", 36, (64, 128), [18], 3),
]
