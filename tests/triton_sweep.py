"""What the Triton launchers would launch for a sweep of calls, found without a GPU and without compiling anything.

The launchers run on tensors without data and do all but launch: choice of the configuration, constants, arguments. A
configuration depends on sizes only through powers of two and through the number of tiles, so the sweep takes every class of
channels up to more than the largest tile holds, maps from one pixel to more than a GPU is busy with, and one of over 2^31
elements per image.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from typing import Any

import torch

MULTIPROCESSORS = {80: 108, 90: 132}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDE = (1, 65536, 32768)

Size = tuple[int, int]


@dataclass(frozen=True)
class Domain:
    """The calls of a sweep: all combinations of these."""

    channels: tuple[int, ...]
    out_channels: tuple[int | None, ...]  # None: no projection
    maps: tuple[tuple[int, int, int], ...]  # batch, height, width
    transfers: tuple[tuple[str, int, int], ...]  # mode, and new size = size * first // second
    activations: tuple[str, ...]
    align_corners: tuple[bool, ...]
    bins: tuple[tuple[int, ...], ...]
    fusions: tuple[tuple[str, tuple[int, ...]], ...]  # mode, and by which factor each term is smaller
    splits: tuple[tuple[tuple[int, ...], int], ...]  # rows of the projections, gated copies
    losses: tuple[
        tuple[int, int, int, torch.dtype, str], ...
    ]  # classes, factor of the size, divisor, labels, reduction


# Up to four branches, as HRNet has.
ALL = Domain(
    channels=(1, 2, 3, 6, 12, 18, 36, 64, 96, 192, 384, 720),
    out_channels=(None, 3, 18, 48, 96, 192),
    maps=(
        (8, 512, 1024),
        (8, 128, 256),
        (4, 128, 128),
        (2, 128, 128),
        (1, 96, 96),
        (1, 64, 64),
        (1, 33, 33),
        (1, 16, 16),
        (1, 8, 8),
        (1, 3, 3),
        (1, 1, 7),
        (1, 7, 1),
        (1, 1, 1),
        WIDE,
    ),
    transfers=(
        ("bilinear", 2, 1),
        ("bilinear", 8, 1),
        ("bilinear", 1, 2),
        ("avg", 1, 1),
        ("avg", 1, 2),
        ("avg", 1, 8),
        ("avg", 2, 1),
        ("nearest", 2, 1),
        ("nearest", 1, 2),
    ),
    activations=("none", "relu"),
    align_corners=(False, True),
    bins=((1,), (6,), (1, 2), (1, 2, 3), (1, 2, 3, 6), (1, 2, 3, 6, 8), (20,)),
    fusions=tuple(
        (mode, factors)
        for mode in ("bilinear", "nearest")
        for factors in ((1,), (1, 1), (2,), (2, 4), (1, 2), (1, 1, 2), (1, 2, 4), (2, 4, 8), (1, 1, 1), (1, 1, 1, 1))
    ),
    splits=(((), 1), ((), 3), ((), 4), ((48,), 0), ((48,), 2), ((96, 48), 0), ((96, 48), 1), ((192, 96, 48), 0)),
    losses=tuple(
        (classes, factor, divisor, labels, reduction)
        for classes in (2, 19, 150)
        for factor, divisor in ((4, 1), (8, 1), (64, 1), (400, 1), (1, 1), (1, 2), (7, 3))
        for labels, reduction in ((torch.int64, "mean"), (torch.int32, "sum"), (torch.uint8, "none"))
    ),
)
QUICK = Domain(
    channels=(36, 192),
    out_channels=(None, 48),
    maps=((8, 128, 256),),
    transfers=(("bilinear", 2, 1), ("avg", 1, 2)),
    activations=("relu",),
    align_corners=(False,),
    bins=((1, 2, 3, 6),),
    fusions=(("bilinear", (1,)), ("bilinear", (1, 2))),
    splits=(((48,), 2),),
    losses=((19, 4, 1, torch.int64, "mean"),),
)


def map_of(*shape: int, dtype: torch.dtype, last: bool) -> torch.Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def scaled(size: Iterable[int], factor: int, divisor: int) -> Size:
    height, width = (max(1, n * factor // divisor) for n in size)
    return height, width


def run_transfers(domain: Domain, x: torch.Tensor) -> None:
    """gated_scale_transfer, affine_scale_transfer and gated_projection on one map, with a gate's gradient and without."""
    from gsto_ops.triton import affine_scale_transfer, gated_projection, gated_scale_transfer

    c, hw, none = x.shape[1], x.shape[2:], (None, None)
    vector = partial(torch.empty, dtype=x.dtype, device="meta")
    rho, scale = vector(1, c, 1, 1), torch.empty(c, dtype=torch.float32, device="meta")
    for (mode, factor, divisor), act, align in product(domain.transfers, domain.activations, domain.align_corners):
        if align and mode != "bilinear":
            continue
        size, options = scaled(hw, factor, divisor), (mode, align, *none)
        for out in domain.out_channels:
            weight, bias = (None, None) if out is None else (vector(out, c, 1, 1), vector(out))
            y, gate = gated_scale_transfer.forward(
                x, rho, None if align else vector(1), weight, bias, act, size, *options
            )
            grad_gate = gate if act == "relu" else None
            gated_scale_transfer.backward(y, grad_gate, x, gate, rho, weight, bias, act, *options)
        y = affine_scale_transfer.forward(x, scale, scale, act, size, *options)
        affine_scale_transfer.backward(y, x, scale, scale, act, *options)
    for out in domain.out_channels:
        if out is None:
            continue
        z, gate, mean, var = gated_projection.forward(x, rho, None, vector(out, c, 1, 1))
        for grads in ((None, mean, var), (gate, None, None)):
            gated_projection.backward(z, *grads, x, gate, rho, vector(out, c, 1, 1), z, mean)


def run_pyramids(domain: Domain, x: torch.Tensor) -> None:
    from gsto_ops.triton import gated_pyramid_pool

    for bins, has_bias in product(domain.bins, (False, True)):
        rho = torch.empty(len(bins), x.shape[1], 1, 1, dtype=x.dtype, device="meta")
        bias = rho[:, 0, 0, 0] if has_bias else None
        pooled, gate = gated_pyramid_pool.forward(x, rho, bias, list(bins))
        gated_pyramid_pool.backward(pooled, gate if has_bias else None, x, gate, rho, list(bins))


def run_sums(domain: Domain, x: torch.Tensor) -> None:
    """batch_norm_sum and its statistics: norms or none, an input, a gate, batch statistics of one process or several."""
    from gsto_ops.triton import batch_norm_sum, channel_statistics, update_running_statistics

    batch, c, *hw = x.shape
    last = x.stride(1) == 1 and c > 1
    gate = torch.empty(batch, 1, *hw, dtype=x.dtype, device="meta")
    mean, _ = channel_statistics.forward(x)
    for (mode, factors), act, align in product(domain.fusions, domain.activations, domain.align_corners):
        if align and mode != "bilinear":
            continue
        terms = [map_of(batch, c, *scaled(hw, 1, f), dtype=x.dtype, last=last) for f in factors]
        norms, eps = [[mean] * len(terms)] * 4, [1e-5] * len(terms)
        batches, pixels = [torch.empty((), dtype=torch.int64, device="meta") for _ in terms], [batch] * len(terms)
        for counts, momentum in product(([], [mean[0]] * len(terms)), (0.1, None)):
            update_running_statistics.forward(*norms[:2], batches, *norms[:2], pixels, counts, momentum)
        for first in ((None, None), (x, None), (x, gate)):
            if first[0] is None and factors[0] != 1:
                continue
            y = batch_norm_sum.forward(*first, terms, *norms, eps, True, None, None, act, mode, align)
            batch_norm_sum.forward(*first, terms, [], [], [], [], [], False, None, None, act, mode, align)
        output = y if act == "relu" else None
        dm, gathered, sums = batch_norm_sum.backward(y, output, terms, *norms[:2], eps, mode, align)
        batch_norm_sum.backward(y, output, terms, [], [], [], mode, align)
        for sums_or_none, counts in ((sums, None), (sums, mean), (None, None)):
            grad = y if output is None else dm
            batch_norm_sum.backward_terms(grad, gathered, terms, *norms[:3], eps, sums_or_none, counts)
            if act == "relu" and len(factors) == 1 and factors[0] == 1:  # a single norm: the mask from its term
                batch_norm_sum.backward(y, None, terms, *norms[:2], eps, mode, align, mean, mean)
                batch_norm_sum.backward_terms(y, [], terms, *norms[:3], eps, sums_or_none, counts, mean)


def run_splits(domain: Domain, x: torch.Tensor) -> None:
    """gated_split with both forms of gates."""
    from gsto_ops.triton import gated_split

    vector = partial(torch.empty, dtype=x.dtype, device="meta")
    for (split, copies), activation, extra in product(domain.splits, ("none", "relu"), (0, 1)):
        gates = len(split) + copies + extra
        rho, weight = vector(gates, x.shape[1], 1, 1), vector(sum(split), x.shape[1], 1, 1) if split else None
        bias = vector(gates) if activation == "relu" else None
        projected, gated, gate, _, _ = gated_split.forward(x, rho, bias, weight, list(split), copies, activation)
        grad_gate = gate if extra else None
        gated_split.backward(projected, gated, grad_gate, x, gate, rho, weight, activation)


def run_losses(domain: Domain, dtype: torch.dtype, last: bool) -> None:
    from gsto_ops.triton import upsample_cross_entropy

    for (classes, factor, divisor, labels, reduction), align in product(domain.losses, domain.align_corners):
        for batch, *hw in ((8, 64, 128), (1, 3, 5), (1, 32768, 32768) if len(domain.maps) > 2 else (1, 9, 9)):
            if hw[0] > 1000 and factor > 1:
                continue
            x = map_of(batch, classes, *hw, dtype=dtype, last=last)
            target = torch.empty((batch, *scaled(hw, factor, divisor)), dtype=labels, device="meta")
            weight = torch.empty(classes, device="meta") if reduction != "sum" else None
            options = (255, reduction, align)
            loss, logsumexp, mass = upsample_cross_entropy.forward(x, target, weight, *options)
            upsample_cross_entropy.backward(loss, x, target, weight, logsumexp, mass, *options)


@dataclass(frozen=True)
class Launch:
    """A kernel with its constants, tile and flags apart, and the arguments of one launch."""

    kernel: Any
    dtype: torch.dtype
    tile: tuple[tuple[str, Any], ...]
    flags: tuple[tuple[str, Any], ...]  # ABSENT: the positions of the arguments that are None
    args: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def constants(self) -> dict[str, Any]:
        return {name: value for name, value in (*self.tile, *self.flags) if name != "ABSENT"}

    @property
    def key(self) -> str:
        """The launch in words, in the order of names."""
        shown = (f"{k}={v}" for k, v in (*self.tile, *self.flags) if v not in (False, "none", ()))
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} {' '.join(shown)}"

    @property
    def elements(self) -> int:
        return math.prod(value for name, value in self.tile if name.startswith("BLOCK"))


def launches(architecture: int, dtype: torch.dtype, domain: Domain, tf32: bool = False) -> list[Launch]:
    """The different launches of a sweep with maps of one dtype on a GPU of this architecture."""
    from gsto_ops.triton import configs

    target = configs.Target(f"sm_{architecture}", MULTIPROCESSORS[architecture], "offline")
    configs.target_of = lambda device: target
    torch.backends.cuda.matmul.allow_tf32 = tf32
    found: dict[tuple, Launch] = {}

    def collect(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
        is_tile = {name: name.startswith(("BLOCK", "num_")) for name in constants}
        tile, flags = (
            tuple(sorted((k, v) for k, v in constants.items() if is_tile[k] == want)) for want in (True, False)
        )
        absent = tuple(i for i, value in enumerate(args) if value is None)
        key = (kernel.__name__, tile, flags, absent)
        if key not in found:
            found[key] = Launch(kernel, dtype, tile, (*flags, ("ABSENT", absent)), args)

    for module in launching_modules():
        module.launch = collect
    for last in (False, True):
        for (batch, *hw), c in product(domain.maps, domain.channels):
            x = map_of(batch, c, *hw, dtype=dtype, last=last)
            for run in (run_transfers, run_pyramids, run_sums, run_splits):
                run(domain, x)
        run_losses(domain, dtype, last)
    return list(found.values())


def launching_modules() -> Iterator[Any]:
    """The modules of gsto_ops.triton that launch kernels."""
    import importlib
    import pkgutil

    import gsto_ops.triton

    for info in pkgutil.iter_modules(gsto_ops.triton.__path__):
        module = importlib.import_module(f"gsto_ops.triton.{info.name}")
        if info.name != "launch" and isinstance(getattr(module, "launch", None), Callable):
            yield module


def covering(found: Iterable[Launch]) -> list[Launch]:
    """Every tile of every kernel at least once in each layout, and every pair of flags with the largest tile that has it."""
    chosen, seen = [], set()
    for launch in sorted(found, key=lambda each: each.elements, reverse=True):
        parts = {(launch.name, pair) for pair in combinations(launch.flags, 2)}
        parts.add((launch.name, launch.tile, dict(launch.flags).get("LAST")))
        if not parts <= seen:
            chosen.append(launch)
            seen |= parts
    return chosen
