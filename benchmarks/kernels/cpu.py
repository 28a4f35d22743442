"""``python -m gsto_benchmarks.kernels.cpu``: the compiled CPU operators against the same steps in eager PyTorch.

The shapes are those of HRNet-W18 and W48 at 512x1024 crops, N = 1. Both sides run in one process on the same threads, in turn,
round after round; times are medians, with the garbage collector off as in ``timeit``. On one thread they are processor time,
without the time of other programs. Every row is checked against float64 before it is timed: a wrong result has no time. Nor has a
row that other programs disturbed, three times over: threads then wait for each other for as long as the scheduler likes.

The floor of a row is the larger of two times that no implementation can beat on this machine: its multiply-adds at the rate of
a large matrix product (forward once, backward twice; the ReLU's mask counts as kept), and the bytes that must be moved (forward:
the map and the results; backward: the map and the gradients of both) at the rate of a copy that moves as many. Both rates are
measured in the same run.
"""

import argparse
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

import gsto_ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
ATTEMPTS = 3
Function = Callable[..., tuple[Tensor, ...]]


@dataclass
class Case:
    """Two functions of the same operands. float32 lists the operands that stay float32 whatever the map's dtype."""

    name: str
    ours: Function
    eager: Function
    shapes: Sequence[tuple[int, ...]]  # of the operands; the first is the map
    float32: Sequence[int] = ()
    other_bytes: int = 0  # per image, that the function reads beside its operands
    multiply_adds: int = 0  # of the forward pass's product


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
]


def make_operands(case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Tensor]:
    """Leaves with gradients; parameters scaled so that every map has values of about one."""
    generator = torch.Generator().manual_seed(0)
    channels = case.shapes[0][1]
    operands = []
    for i, shape in enumerate(case.shapes):
        values = torch.randn(shape, generator=generator)
        if i == 0:
            values = values.contiguous(memory_format=memory_format)
        elif len(shape) == 4:
            values = values / channels**0.5
        values = values if i in case.float32 else values.to(dtype)
        operands.append(values.requires_grad_())
    return operands


def results(function: Function, operands: Sequence[Tensor], grads: Sequence[Tensor] | None) -> list[Tensor]:
    """The outputs, and with ``grads`` the gradients of all operands."""
    if grads is None:
        with torch.no_grad():
            return list(function(*operands))
    outputs = function(*operands)
    return [*outputs, *torch.autograd.grad(outputs, operands, grads)]


def errors(case: Case, operands: Sequence[Tensor], grads: Sequence[Tensor] | None) -> tuple[float, float]:
    """The largest error of (ours, eager) over all results: the norm of the difference from float64 over float64's norm."""
    wide = [o.detach().double().requires_grad_() for o in operands]
    exact = results(case.eager, wide, None if grads is None else [g.double() for g in grads])
    found = []
    for function in (case.ours, case.eager):
        pairs = zip(results(function, operands, grads), exact, strict=True)
        found.append(max(float((r.detach().double() - e.detach()).norm() / e.detach().norm()) for r, e in pairs))
    return found[0], found[1]


def clock() -> float:
    """Seconds; on one thread those of the processor."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(function: Function, operands: Sequence[Tensor], grads: Sequence[Tensor] | None) -> float:
    start = clock()
    results(function, operands, grads)
    return clock() - start


def best_time(run: Callable[[], object], rounds: int = 15) -> float:
    """The least of the times in seconds: a peak is what the machine can do undisturbed."""
    times = []
    for _ in range(rounds):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """Multiply-adds per second of a large matrix product.

    float32: at least half of bfloat16's rate, because an instruction multiplies 32 bfloat16 or 16 float32, and PyTorch's float32
    product may be far from that (115 of 260 GFLOP/s on one EPYC).
    """
    size = 1024
    a, b = torch.randn(2, size, size).to(dtype)
    rate = size**3 / best_time(lambda: a @ b)
    return max(rate, product_rate(torch.bfloat16) / 2) if dtype == torch.float32 else rate


@functools.cache
def copy_time(count: int) -> float:
    """Seconds for a copy that reads and writes ``count`` bytes together."""
    source = torch.zeros(max(1, count // 2), dtype=torch.uint8)
    to = torch.empty_like(source)
    return best_time(lambda: to.copy_(source))


def floor_time(case: Case, operands: Sequence[Tensor], outputs: Sequence[Tensor], backward: bool) -> float:
    x = operands[0]
    moved = [x, *outputs, *([x, *outputs, x] if backward else [])]
    others = (2 if backward else 1) * case.other_bytes
    copied = copy_time(sum(t.numel() * t.element_size() for t in moved) + others)
    if not case.multiply_adds:
        return copied
    return max(copied, (3 if backward else 1) * case.multiply_adds / product_rate(x.dtype))


def measure(case: Case, dtype: torch.dtype, memory_format: torch.memory_format, backward: bool, rounds: int) -> str:
    """One row of the table. RuntimeError when the operator is less exact than eager PyTorch allows for."""
    operands = make_operands(case, dtype, memory_format)
    with torch.no_grad():
        outputs = case.eager(*operands)
    grads = None
    if backward:
        generator = torch.Generator().manual_seed(1)
        grads = [torch.empty_like(o).copy_(torch.randn(o.shape, generator=generator)) for o in outputs]
    error, eager_error = errors(case, operands, grads)
    eps = torch.finfo(dtype).eps
    # Of the values under a ReLU a share of eps is so near zero that its gradient is a matter of rounding.
    allowed = 2 * eager_error + 4 * eps + (4 * eps**0.5 if backward and "relu" in case.name else 0)
    if error > allowed:
        raise RuntimeError(
            f"{case.name}, {dtype}: error {error:.2g} against float64, eager PyTorch has {eager_error:.2g}"
        )
    floor = 1e3 * floor_time(case, operands, outputs, backward)
    for _ in range(ATTEMPTS):
        alone = has_all_cores()
        times = rounds_of(case, operands, grads, rounds)
        eager, ours = (1e3 * statistics.median(t) for t in times)
        if alone and has_all_cores() and all(statistics.median(t) < 2 * min(t) for t in times):
            ratios = f"{eager / ours:.2f} | {floor:.3f} | {ours / floor:.1f} | {eager / floor:.1f}"
            return f"{eager:.3f} | {ours:.3f} | {ratios} | {error:.1e} ({eager_error:.1e})"
    return f"disturbed | disturbed | - | {floor:.3f} | - | - | {error:.1e} ({eager_error:.1e})"


def has_all_cores() -> bool:
    """Whether a sum that takes all threads some 20 microseconds takes less than half a millisecond."""
    x = torch.ones(1 << 17)
    times = []
    for _ in range(11):
        start = clock()
        torch.add(x, x)
        times.append(clock() - start)
    return statistics.median(times) < 5e-4


def rounds_of(
    case: Case, operands: Sequence[Tensor], grads: Sequence[Tensor] | None, rounds: int
) -> tuple[list[float], list[float]]:
    """The times of eager PyTorch and of ours, taken in turn."""
    eager, ours = [], []
    for _ in range(rounds):
        eager.append(seconds(case.eager, operands, grads))
        ours.append(seconds(case.ours, operands, grads))
    return eager, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per row; times are medians")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="may be repeated; default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; default: all")
    arguments = parser.parse_args()
    cases = [case for case in CASES if arguments.only in case.name]
    if not cases:
        parser.error(f"--only: no case contains {arguments.only!r}; cases are: {', '.join(c.name for c in CASES)}")
    torch.set_num_threads(arguments.threads)
    # glibc gives small heaps back to the system and faults them in again at the next call, until a large block has been
    # freed once. Any process that has run a network is past that.
    for _ in range(2):
        torch.empty(30 << 20, dtype=torch.uint8)
    gc.disable()
    with gsto_ops.use_backend("cpu"):
        times = "eager ms | ours ms | eager / ours | floor ms | ours / floor | eager / floor"
        print(f"| case | layout | dtype | pass | {times} | error (eager's) |")
        print("|" + " --- |" * 11)
        for case in cases:
            for layout in arguments.layout or LAYOUTS:
                for dtype in arguments.dtype or DTYPES:
                    for backward in (False, True):
                        row = measure(case, DTYPES[dtype], LAYOUTS[layout], backward, arguments.rounds)
                        name = "forward + backward" if backward else "forward"
                        print(f"| {case.name} | {layout} | {dtype} | {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
