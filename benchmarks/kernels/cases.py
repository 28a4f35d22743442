"""How the kernel benchmarks make a case: an operator, the same steps in eager PyTorch, and the shapes of their operands.

Every case has three functions of the same operands: ``ours``; ``eager``, the steps as the paper and HRNet's code write them; and
``reformulated``, the same mathematics as one would write it for a compiler: gate and projections in one product, the gate applied
to the product, the product where there are fewer pixels, norms as one multiply-add.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gsto_ops
from gsto_ops.ops import library

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """Three functions of the same operands, which are leaves of ``shapes`` and then ``constants`` of the first map.

    The first ``maps`` shapes are maps, with N = 1; ``images`` is a batch that the case insists on. float32 lists the operands
    that stay float32 whatever the maps' dtype. Per image: multiply_adds, of the forward pass's products, and other_bytes,
    which the functions read beside the maps.
    """

    operator: str
    name: str
    ours: Function
    eager: Function
    reformulated: Function
    shapes: Sequence[tuple[int, ...]]
    maps: int = 1
    float32: Sequence[int] = ()
    multiply_adds: int = 0
    other_bytes: int = 0
    relu: bool = False
    differentiable: bool = True
    images: int | None = None
    constants: Callable[[Tensor], list[Tensor]] = lambda x: []

    def __str__(self) -> str:
        return f"{self.operator}: {self.name}"

    def of_images(self, images: int) -> "Case":
        """The case with its own batch, else with this one."""
        images = self.images or images
        maps = [(images, *shape[1:]) for shape in self.shapes[: self.maps]]
        return replace(
            self,
            name=f"{self.name}, N = {images}",
            shapes=[*maps, *self.shapes[self.maps :]],
            multiply_adds=images * self.multiply_adds,
            other_bytes=images * self.other_bytes,
        )


def resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.adaptive_avg_pool2d(x, size) if mode == "avg" else F.interpolate(x, size=size, mode=mode)


def mode_of(size: tuple[int, int], to: tuple[int, int]) -> str:
    return "avg" if to[0] < size[0] else "bilinear"


def per_channel(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """A norm as one multiply-add, in the map's dtype."""
    return (scale[:, None, None] * x + shift[:, None, None]).to(x.dtype)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of every channel, at least in float32."""
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3), correction=0)
    return mean, var


def batch_norm_factors(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in training mode."""
    mean, var = statistics(x)
    scale = weight * (var + 1e-5).rsqrt()
    return scale, bias - mean * scale


def transfer(
    name: str, channels: int, out: int | None, size: tuple[int, int], to: tuple[int, int], relu: bool = False
) -> Case:
    """gated_scale_transfer; with ``relu`` in its folded-BN inference form."""
    mode, activation = mode_of(size, to), "relu" if relu else None

    def ours(x: Tensor, gate_weight: Tensor, weight: Tensor | None = None, bias: Tensor | None = None):
        y = gsto_ops.gated_scale_transfer(x, gate_weight, None, weight, bias, activation=activation, size=to, mode=mode)
        return (y,)

    def eager(x: Tensor, gate_weight: Tensor, weight: Tensor | None = None, bias: Tensor | None = None):
        y = torch.sigmoid(F.conv2d(x, gate_weight)) * x
        if weight is not None:
            y = F.conv2d(y, weight, bias)
        return (resize(y.relu() if relu else y, to, mode),)

    def reformulated(x: Tensor, gate_weight: Tensor, weight: Tensor | None = None, bias: Tensor | None = None):
        if weight is None or (mode == "avg" and not relu):  # the product of the pooled map
            pooled = resize(torch.sigmoid(F.conv2d(x, gate_weight)) * x, to, mode)
            return (pooled if weight is None else F.conv2d(pooled, weight, bias),)
        rows = F.conv2d(x, torch.cat([weight, gate_weight]))
        y = torch.sigmoid(rows[:, out:]) * rows[:, :out] + bias[:, None, None]
        return (resize(y.relu() if relu else y, to, mode),)

    shapes = [(1, channels, *size), (1, channels, 1, 1)]
    if out:
        shapes += [(out, channels, 1, 1), (out,)]
    # Without an activation the product may run where there are fewer pixels.
    pixels = math.prod(size) if relu else min(math.prod(size), math.prod(to))
    product = channels * (math.prod(size) + (out or 0) * pixels)
    name = f"relu, {name}" if relu else name
    return Case("gated_scale_transfer", name, ours, eager, reformulated, shapes, multiply_adds=product, relu=relu)


def supervised(name: str, channels: int, out: int, classes: int, size: tuple[int, int], to: tuple[int, int]) -> Case:
    """supervised_gated_scale_transfer in its folded-BN form with ReLU: the paper's gated transition; a class map comes along."""
    mode = mode_of(size, to)

    def ours(x: Tensor, class_weight: Tensor, class_bias: Tensor, gate_weight: Tensor, weight: Tensor, bias: Tensor):
        return gsto_ops.supervised_gated_scale_transfer(
            x, class_weight, class_bias, gate_weight, None, weight, bias, activation="relu", size=to, mode=mode
        )

    def eager(x: Tensor, class_weight: Tensor, class_bias: Tensor, gate_weight: Tensor, weight: Tensor, bias: Tensor):
        class_map = F.conv2d(x, class_weight, class_bias)
        y = F.conv2d(torch.sigmoid(F.conv2d(class_map, gate_weight)) * x, weight, bias)
        return resize(y.relu(), to, mode), class_map

    def reformulated(
        x: Tensor, class_weight: Tensor, class_bias: Tensor, gate_weight: Tensor, weight: Tensor, bias: Tensor
    ):
        rows = F.conv2d(x, torch.cat([weight, class_weight]))
        class_map = rows[:, out:] + class_bias[:, None, None]
        gate = torch.sigmoid((gate_weight * class_map).sum(1, keepdim=True))
        return resize((gate * rows[:, :out] + bias[:, None, None]).relu(), to, mode), class_map

    shapes = [(1, channels, *size), (classes, channels, 1, 1), (classes,), (1, classes, 1, 1)]
    shapes += [(out, channels, 1, 1), (out,)]
    product = math.prod(size) * (channels * (classes + out) + classes)
    name = f"relu, {name}"
    return Case(
        "supervised_gated_scale_transfer", name, ours, eager, reformulated, shapes, multiply_adds=product, relu=True
    )


def class_map(name: str, channels: int, classes: int, size: tuple[int, int]) -> Case:
    """class_map, which on a GPU is PyTorch's convolution. Reformulated: a matrix product."""

    def ours(x: Tensor, class_weight: Tensor, class_bias: Tensor):
        return ((operators_of(x) or gsto_ops.reference).class_map(x, class_weight, class_bias),)

    def eager(x: Tensor, class_weight: Tensor, class_bias: Tensor):
        return (F.conv2d(x, class_weight, class_bias),)

    def reformulated(x: Tensor, class_weight: Tensor, class_bias: Tensor):
        return (torch.einsum("nchw,oc->nohw", x, class_weight[:, :, 0, 0]) + class_bias[:, None, None],)

    shapes = [(1, channels, *size), (classes, channels, 1, 1), (classes,)]
    product = channels * classes * math.prod(size)
    return Case("class_map", name, ours, eager, reformulated, shapes, multiply_adds=product)


def projection(name: str, channels: int, out: int, size: tuple[int, int]) -> Case:
    """gated_projection; eager takes the statistics that a batch norm needs."""

    def ours(x: Tensor, gate_weight: Tensor, weight: Tensor):
        return gsto_ops.gated_projection(x, gate_weight, None, weight)

    def eager(x: Tensor, gate_weight: Tensor, weight: Tensor):
        gate = torch.sigmoid(F.conv2d(x, gate_weight))
        z = F.conv2d(gate * x, weight)
        return z, gate, *statistics(z)

    def reformulated(x: Tensor, gate_weight: Tensor, weight: Tensor):
        rows = F.conv2d(x, torch.cat([weight, gate_weight]))
        gate = torch.sigmoid(rows[:, out:])
        z = gate * rows[:, :out]
        return z, gate, *statistics(z)

    shapes = [(1, channels, *size), (1, channels, 1, 1), (out, channels, 1, 1)]
    product = channels * (out + 1) * math.prod(size)
    return Case("gated_projection", name, ours, eager, reformulated, shapes, multiply_adds=product)


def affine(name: str, channels: int, size: tuple[int, int], to: tuple[int, int], relu: bool = False) -> Case:
    """affine_scale_transfer; eager runs a batch norm in eval mode."""
    mode, activation = mode_of(size, to), "relu" if relu else None

    def ours(x: Tensor, scale: Tensor, shift: Tensor):
        return (gsto_ops.affine_scale_transfer(x, scale, shift, activation=activation, size=to, mode=mode),)

    def eager(x: Tensor, scale: Tensor, shift: Tensor):
        y = F.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, eps=0.0)
        return (resize(y.relu() if relu else y, to, mode),)

    def reformulated(x: Tensor, scale: Tensor, shift: Tensor):
        y = per_channel(x, scale, shift)
        return (resize(y.relu() if relu else y, to, mode),)

    shapes = [(1, channels, *size), (channels,), (channels,)]
    name = f"relu, {name}" if relu else name
    return Case("affine_scale_transfer", name, ours, eager, reformulated, shapes, float32=(1, 2), relu=relu)


def training(
    name: str, channels: int, out: int, size: tuple[int, int], to: tuple[int, int], relu: bool = False
) -> Case:
    """A projection with a batch norm in training mode: gated_batch_norm_transfer."""
    mode, activation = mode_of(size, to), "relu" if relu else None

    def ours(x: Tensor, gate_weight: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor):
        parameters = (gate_weight, None, weight, norm_weight, norm_bias)
        return gsto_ops.gated_batch_norm_transfer(x, *parameters, activation=activation, size=to, mode=mode)[:1]

    def eager(x: Tensor, gate_weight: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor):
        z = F.conv2d(torch.sigmoid(F.conv2d(x, gate_weight)) * x, weight)
        y = F.batch_norm(z, None, None, norm_weight, norm_bias, training=True)
        return (resize(y.relu() if relu else y, to, mode),)

    def reformulated(x: Tensor, gate_weight: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor):
        rows = F.conv2d(x, torch.cat([weight, gate_weight]))
        z = torch.sigmoid(rows[:, out:]) * rows[:, :out]
        y = per_channel(z, *batch_norm_factors(z, norm_weight, norm_bias))
        return (resize(y.relu() if relu else y, to, mode),)

    shapes = [(1, channels, *size), (1, channels, 1, 1), (out, channels, 1, 1), (out,), (out,)]
    product = channels * (out + 1) * math.prod(size)
    name = f"relu, {name}" if relu else name
    operator = "gated_batch_norm_transfer"
    return Case(operator, name, ours, eager, reformulated, shapes, float32=(3, 4), multiply_adds=product, relu=relu)


def pooling_matrix(size: tuple[int, int], bins: int, x: Tensor) -> Tensor:
    """(H, W, bins^2): adaptive average pooling as a matrix, for maps like x."""
    rows, columns = (F.adaptive_avg_pool1d(torch.eye(n, dtype=torch.float64), bins) for n in size)
    return torch.einsum("ha,wb->hwab", rows, columns).flatten(2).to(x)


def pyramid(name: str, channels: int, size: tuple[int, int], bins: Sequence[int] = (1, 2, 3, 6)) -> Case:
    """gated_pyramid_pool; eager makes all gates in one convolution. Reformulated: all poolings as one product."""

    def ours(x: Tensor, gate_weight: Tensor, gate_bias: Tensor, *matrices: Tensor):
        pooled, _ = gsto_ops.gated_pyramid_pool(x, gate_weight, gate_bias, bins=list(bins))
        return tuple(pooled)

    def eager(x: Tensor, gate_weight: Tensor, gate_bias: Tensor, *matrices: Tensor):
        gate = torch.sigmoid(F.conv2d(x, gate_weight, gate_bias))
        return tuple(F.adaptive_avg_pool2d(gate[:, k : k + 1] * x, b) for k, b in enumerate(bins))

    def reformulated(x: Tensor, gate_weight: Tensor, gate_bias: Tensor, *matrices: Tensor):
        gate = torch.sigmoid(F.conv2d(x, gate_weight, gate_bias))
        cells = torch.cat([gate[:, k, :, :, None] * matrix for k, matrix in enumerate(matrices)], 3)
        pooled = torch.einsum("nchw,nhwb->ncb", x, cells).split([b * b for b in bins], 2)
        return tuple(part.unflatten(2, (b, b)) for part, b in zip(pooled, bins, strict=True))

    def matrices(x: Tensor) -> list[Tensor]:
        return [pooling_matrix(size, b, x) for b in bins]

    shapes = [(1, channels, *size), (len(bins), channels, 1, 1), (len(bins),)]
    product = channels * len(bins) * math.prod(size)
    return Case(
        "gated_pyramid_pool", name, ours, eager, reformulated, shapes, multiply_adds=product, constants=matrices
    )


def cross_entropy(name: str, classes: int, size: tuple[int, int], to: tuple[int, int]) -> Case:
    """upsample_cross_entropy; a tenth of the labels are ignored."""

    def labels(x: Tensor) -> list[Tensor]:
        target = torch.randint(0, classes, (len(x), *to), generator=torch.Generator().manual_seed(0))
        target[:, : to[0] // 10] = 255
        return [target.to(x.device)]

    def upsampled(x: Tensor) -> Tensor:
        return F.interpolate(x if x.dtype == torch.float64 else x.float(), size=to, mode="bilinear")

    def ours(x: Tensor, target: Tensor):
        return (gsto_ops.upsample_cross_entropy(x, target, ignore_index=255),)

    def eager(x: Tensor, target: Tensor):
        return (F.cross_entropy(upsampled(x), target, ignore_index=255),)

    def reformulated(x: Tensor, target: Tensor):
        logits, labelled = upsampled(x), target != 255
        chosen = logits.gather(1, (target * labelled)[:, None])[:, 0]
        return (((logits.logsumexp(1) - chosen) * labelled).sum() / labelled.sum(),)

    shapes, labels_bytes = [(1, classes, *size)], 8 * math.prod(to)
    operator = "upsample_cross_entropy"
    return Case(operator, name, ours, eager, reformulated, shapes, other_bytes=labels_bytes, constants=labels)


def operators_of(x: Tensor) -> Any:
    """The operators of the backend in use, as the public functions take them; None for the reference."""
    backend = gsto_ops.backends.select(x.device, x.dtype)
    if backend == "reference":
        return None
    return library.operators["gsto_triton" if backend == "triton" else "gsto_ops"]


def channel_statistics(name: str, channels: int, size: tuple[int, int]) -> Case:
    """channel_statistics, which has no gradient. Reformulated: both moments from one read."""

    def ours(x: Tensor):
        return (operators_of(x) or gsto_ops.reference).channel_statistics(x)

    def reformulated(x: Tensor):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.mean((0, 2, 3))
        return mean, wide.square().mean((0, 2, 3)) - mean.square()

    shapes = [(1, channels, *size)]
    return Case("channel_statistics", name, ours, statistics, reformulated, shapes, differentiable=False)


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
        ops, eps = operators_of(operands[0]), [1e-5] * len(terms)
        if ops is None:  # plain PyTorch differentiates the statistics, too
            mean, var = map(list, zip(*map(gsto_ops.reference.channel_statistics, given), strict=True))
            norms = (mean, var, weight, bias, eps)
            return (gsto_ops.reference.batch_norm_sum(x, None, given, *norms, "relu", "bilinear"),)
        mean, var = map(list, zip(*(ops.channel_statistics(term.detach()) for term in given), strict=True))
        norms = (mean, var, weight, bias, eps, True, None, None)
        return (ops.batch_norm_sum(x, None, given, *norms, "relu", "bilinear", False),)

    def eager(*operands: Tensor):
        x, given, weight, bias = split(operands)
        parts = [] if x is None else [x]
        for term, gamma, beta in zip(given, weight, bias, strict=True):
            parts.append(resize(F.batch_norm(term, None, None, gamma, beta, training=True), size, "bilinear"))
        return (sum(parts[1:], parts[0]).relu(),)

    def reformulated(*operands: Tensor):
        x, given, weight, bias = split(operands)
        parts = [] if x is None else [x]
        for term, gamma, beta in zip(given, weight, bias, strict=True):
            parts.append(resize(per_channel(term, *batch_norm_factors(term, gamma, beta)), size, "bilinear"))
        return (sum(parts[1:], parts[0]).relu(),)

    shapes = [(1, channels, *map_size) for map_size in maps] + [(channels,)] * (2 * len(terms))
    float32 = range(len(maps), len(shapes))
    name = f"relu, {name}"
    return Case("batch_norm_sum", name, ours, eager, reformulated, shapes, maps=len(maps), float32=float32, relu=True)


def split(name: str, channels: int, size: tuple[int, int], projections: Sequence[int], copies: int) -> Case:
    """gated_split of a branch; eager takes the statistics, too."""
    gates = len(projections) + copies

    def ours(x: Tensor, gate_weight: Tensor, *weight: Tensor):
        matrix = weight[0] if weight else None
        result = gsto_ops.gated_split(x, gate_weight, None, matrix, split=projections, copies=copies)
        moments = [result.mean, result.var] if projections else []
        return *result.projected, *result.gated, *moments

    def results(each: Sequence[Tensor], projected: Sequence[Tensor], x: Tensor):
        moments = map(torch.cat, zip(*(statistics(z.detach()) for z in projected), strict=True))
        return *projected, *(gate * x for gate in each[len(projections) :]), *moments

    def eager(x: Tensor, gate_weight: Tensor, *weight: Tensor):
        each = torch.sigmoid(F.conv2d(x, gate_weight)).split(1, 1)
        blocks = weight[0].split(list(projections)) if weight else ()
        return results(each, [F.conv2d(gate * x, block) for gate, block in zip(each, blocks, strict=False)], x)

    def reformulated(x: Tensor, gate_weight: Tensor, *weight: Tensor):
        logits, *rows = F.conv2d(x, torch.cat([gate_weight, *weight])).split([gates, *projections], 1)
        each = torch.sigmoid(logits).split(1, 1)
        return results(each, [gate * z for gate, z in zip(each, rows, strict=False)], x)

    shapes = [(1, channels, *size), (gates, channels, 1, 1)]
    shapes += [(sum(projections), channels, 1, 1)] if projections else []
    product = channels * (gates + sum(projections)) * math.prod(size)
    return Case("gated_split", name, ours, eager, reformulated, shapes, multiply_adds=product)
