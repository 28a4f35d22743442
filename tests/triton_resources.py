"""Compiles the Triton kernels ahead of time for sm_80 and sm_90, in every configuration that the plans choose for a sweep of
problems, prints what each uses, and fails on spills or where a multiprocessor has too little shared memory.

Needs triton, no GPU: python tests/triton_resources.py [--quick] [architecture ...]
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes per program
MULTIPROCESSORS = {80: 108, 90: 132}
# Bytes per thread that ptxas may spill: a few registers, which it gives up by itself where one more program then fits a
# multiprocessor. More is a tile that is too large.
SPILL_LIMIT = 32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# batch, channels, out_channels (None: no projection), size, new size, mode, activation
TRANSFERS = [
    (8, 96, 48, (256, 512), (512, 1024), "bilinear", "none"),
    (8, 96, 48, (64, 128), (128, 256), "bilinear", "relu"),
    (8, 384, 48, (16, 32), (128, 256), "bilinear", "none"),
    (8, 48, 96, (512, 1024), (256, 512), "avg", "none"),
    (8, 48, 192, (128, 256), (32, 64), "avg", "relu"),
    (8, 48, 384, (128, 256), (16, 32), "avg", "none"),
    (8, 2048, 512, (64, 128), (6, 6), "avg", "none"),
    (8, 720, 720, (128, 256), (128, 256), "avg", "none"),
    (1, 18, 36, (129, 257), (65, 129), "avg", "none"),
    (3, 36, 18, (33, 65), (66, 130), "nearest", "none"),
    (2, 130, 70, (45, 61), (23, 31), "bilinear", "none"),
    (4, 256, None, (64, 128), (32, 64), "avg", "none"),
    (4, 64, None, (64, 128), (128, 256), "bilinear", "relu"),
    (1, 512, None, (64, 64), (64, 64), "avg", "none"),
    (1, 1024, None, (64, 64), (32, 32), "avg", "relu"),
    (2, 1, 3, (9, 9), (4, 4), "nearest", "none"),
]
# batch, classes, size of the logits, size and type of the labels, reduction
LOSSES = [
    (8, 19, (128, 256), (512, 1024), torch.int64, "mean"),
    (8, 60, (120, 120), (480, 480), torch.uint8, "none"),
    (2, 150, (65, 33), (513, 257), torch.int32, "sum"),
    (1, 2, (64, 64), (32, 32), torch.int64, "mean"),
    (1, 11, (4, 3), (512, 1600), torch.int64, "mean"),
]
# batch, channels, size, whether there is a gated input, sizes of the terms, mode
SUMS = [
    (8, 48, (128, 256), False, [(128, 256)], "bilinear"),
    (8, 256, (128, 256), True, [(128, 256), (128, 256)], "bilinear"),
    (8, 48, (128, 256), True, [(64, 128), (32, 64), (16, 32)], "bilinear"),
    (8, 192, (32, 64), True, [(32, 64), (32, 64), (16, 32)], "nearest"),
    (2, 36, (65, 129), True, [(65, 129), (33, 65)], "bilinear"),
    (1, 130, (31, 45), False, [(31, 45)] * 4, "bilinear"),
    (2, 18, (64, 128), True, [(64, 128)], "nearest"),
]
# batch, channels, size, rows of the projections, gated copies
SPLITS = [
    (8, 48, (128, 256), [], 3),
    (8, 96, (64, 128), [48], 2),
    (8, 192, (32, 64), [96, 48], 1),
    (8, 384, (16, 32), [192, 96, 48], 0),
    (2, 36, (65, 129), [18], 3),
    (1, 18, (33, 65), [], 4),
    (1, 720, (16, 32), [60], 1),
    (1, 520, (16, 32), [], 2),
]
PYRAMIDS = [(8, 2048, (64, 128), (1, 2, 3, 6)), (1, 130, (33, 17), (1, 2, 3, 6, 8)), (2, 18, (9, 13), (20,))]


@dataclass(frozen=True)
class Kernel:
    name: str
    flags: str
    architecture: int
    registers: int
    shared: int
    stack: int

    @property
    def wrong(self) -> str:
        if self.stack > SPILL_LIMIT:
            return "  <- spills"
        return "  <- shared memory" if self.shared > SHARED_LIMIT[self.architecture] else ""


class OfflineDriver:
    """What Triton asks of a driver in order to compile, for a GPU that need not be here."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def map_of(*shape: int, dtype: torch.dtype, last: bool) -> torch.Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def run_sums(dtype: torch.dtype, last: bool, quick: bool) -> None:
    """batch_norm_sum and channel_statistics, with and without norms, ReLU and batch statistics."""
    from gsto_ops.triton import batch_norm_sum, channel_statistics

    new_map = partial(map_of, dtype=dtype, last=last)
    for batch, c, hw, with_input, sizes, mode in SUMS[1:3] if quick else SUMS:
        terms = [new_map(batch, c, *size) for size in sizes]
        x, gate = (new_map(batch, c, *hw), torch.empty(batch, 1, *hw, dtype=dtype, device="meta"))
        mean, var = channel_statistics.forward(x)
        norms, eps = [[vector] * len(terms) for vector in (mean, var, mean, mean)], [1e-5] * len(terms)
        operands = (x if with_input else None, gate if with_input and c < 256 else None, terms)
        rest = (True, None, None, "relu", mode, c == 36)
        y = batch_norm_sum.forward(*operands, *norms, eps, *rest)
        dm, gathered, sums = batch_norm_sum.backward(y, y, terms, norms[0], mode, c == 36)
        for sums_or_none, counts in ((sums, None), (sums, mean[: len(terms)]), (None, None)):
            batch_norm_sum.backward_terms(dm, gathered, terms, *norms[:3], eps, sums_or_none, counts)
        if not quick:
            batch_norm_sum.forward(*operands, [], [], [], [], [], False, None, None, "none", mode, False)
            batch_norm_sum.backward(y, None, terms, [], mode, False)


def run_splits(dtype: torch.dtype, last: bool, quick: bool) -> None:
    """gated_split with both forms of gates."""
    from gsto_ops.triton import gated_split

    vector = partial(torch.empty, dtype=dtype, device="meta")
    for batch, c, hw, split, copies in SPLITS[:3] if quick else SPLITS:
        x, gates = map_of(batch, c, *hw, dtype=dtype, last=last), len(split) + copies + 1
        rho, weight = vector(gates, c, 1, 1), vector(sum(split), c, 1, 1) if split else None
        for activation, bias in (("none", None), ("relu", vector(gates))):
            projected, gated, gate, _, _ = gated_split.forward(x, rho, bias, weight, split, copies, activation)
            gated_split.backward(projected, gated, gate if bias is None else None, x, gate, rho, weight, activation)


def run_operators(dtype: torch.dtype, last: bool, quick: bool) -> None:
    """Every operator, forward and backward, on tensors without data: the launchers do all but launch."""
    run_sums(dtype, last, quick)
    run_splits(dtype, last, quick)
    from gsto_ops.triton import (
        affine_scale_transfer,
        gated_projection,
        gated_pyramid_pool,
        gated_scale_transfer,
        upsample_cross_entropy,
    )

    new_map = partial(map_of, dtype=dtype, last=last)
    vector = partial(torch.empty, dtype=dtype, device="meta")
    floats = partial(torch.empty, dtype=torch.float32, device="meta")
    none = (None, None)
    for batch, c, out, hw, size, mode, activation in TRANSFERS[3::4] if quick else TRANSFERS:
        x, rho = new_map(batch, c, *hw), vector(1, c, 1, 1)
        weight, bias = (None, None) if out is None else (vector(out, c, 1, 1), vector(out))
        y, gate = gated_scale_transfer.forward(x, rho, vector(1), weight, bias, activation, size, mode, False, *none)
        grad_gate = torch.empty_like(gate) if c % 4 else None
        gated_scale_transfer.backward(y, grad_gate, x, gate, rho, weight, bias, activation, mode, False, *none)
        scales = floats(c), floats(c)
        y = affine_scale_transfer.forward(x, *scales, activation, size, mode, mode == "bilinear", *none)
        affine_scale_transfer.backward(y, x, *scales, activation, mode, mode == "bilinear", *none)
        if out is not None:
            z, gate, mean, var = gated_projection.forward(x, rho, None, weight)
            statistics = none if c % 4 else (mean, var)
            gated_projection.backward(z, None, *statistics, x, gate, rho, weight, z, mean)
    for batch, c, hw, bins in PYRAMIDS[: 1 if quick else None]:
        x, rho = new_map(batch, c, *hw), vector(len(bins), c, 1, 1)
        pooled, gate = gated_pyramid_pool.forward(x, rho, vector(len(bins)), bins)
        gated_pyramid_pool.backward(pooled, gate, x, gate, rho, bins)
    for batch, c, hw, size, labels, reduction in LOSSES[: 1 if quick else None]:
        x, target = new_map(batch, c, *hw), torch.empty((batch, *size), dtype=labels, device="meta")
        options = (255, reduction, False)
        weight = None if c % 4 else floats(c)
        loss, logsumexp, mass = upsample_cross_entropy.forward(x, target, weight, *options)
        upsample_cross_entropy.backward(loss, x, target, weight, logsumexp, mass, *options)


def usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and so on of a kernel's machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", report.split("Function")[-1])}


def short(constants: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in constants.items() if v is not False and v != "none")


def compile_all(architecture: int, dtype: torch.dtype, quick: bool, tf32: bool) -> list[Kernel]:
    """Compiles what the operators would launch with maps of one dtype on a GPU of this architecture."""
    import triton

    from gsto_ops.triton import (
        configs,
        gate,
        norm,
        norm_backward,
        product,
        pyramid,
        pyramid_backward,
        reduce,
        resample,
        split,
        split_backward,
        upsample_cross_entropy,
    )

    modules = (
        gate,
        norm,
        norm_backward,
        product,
        pyramid,
        pyramid_backward,
        reduce,
        resample,
        split,
        split_backward,
        upsample_cross_entropy,
    )

    triton.runtime.driver.set_active(OfflineDriver(architecture))
    target = configs.Target(f"sm_{architecture}", MULTIPROCESSORS[architecture], "offline")
    configs.target_of = lambda device: target
    torch.backends.cuda.matmul.allow_tf32 = tf32
    found: dict[str, Kernel] = {}

    def compile_only(kernel, programs: int, device, *args, **constants) -> None:
        compiled = kernel.warmup(*args, grid=(programs,), **constants)
        if compiled.hash not in found:
            used = usage(compiled.asm["cubin"])
            flags = f"{str(dtype).removeprefix('torch.')} {short(constants)}"
            shared = compiled.metadata.shared
            found[compiled.hash] = Kernel(
                kernel.__name__, flags, architecture, used["REG"], shared, used["STACK"] + used["LOCAL"]
            )

    for module in modules:
        module.launch = compile_only
    for last in (False, True):
        run_operators(dtype, last, quick)
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", type=int, default=[80, 90])
    parser.add_argument("--quick", action="store_true", help="a representative part of the sweep, bfloat16 only")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    dtypes = DTYPES[:1] if options.quick else DTYPES
    jobs = [(a, d, options.quick, False) for a, d in itertools.product(options.architectures, dtypes)]
    if not options.quick:
        jobs += [(a, torch.float32, False, True) for a in options.architectures]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(compile_all, *zip(*jobs, strict=True))
        kernels = sorted((k for part in parts for k in part), key=lambda k: (k.name, k.flags, k.architecture))
    print(f"{'kernel':<28}{'arch':>6}{'registers':>11}{'shared':>9}{'stack':>7}  configuration")
    for k in kernels:
        print(f"{k.name:<28}{k.architecture:>6}{k.registers:>11}{k.shared:>9}{k.stack:>7}  {k.flags}{k.wrong}")
    bad = sum(bool(k.wrong) for k in kernels)
    print(f"{len(kernels)} kernels, {bad} with spills or too much shared memory")
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
