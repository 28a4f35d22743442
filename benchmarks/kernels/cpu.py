"""``python -m gsto_benchmarks.kernels.cpu``: the compiled CPU operators against the same steps in eager PyTorch.

The cases are those of ``kernels.cases``. Both sides run in one process on the same threads, in turn, round after round; times are
medians, with the garbage collector off as in ``timeit``. On one thread they are processor time, without the time of other
programs. Every row is checked against float64 before it is timed: a wrong result has no time. Nor has a row that other programs
disturbed, three times over: threads then wait for each other for as long as the scheduler likes.

The floor of a row is the larger of two times that no implementation can beat on this machine: its multiply-adds at the rate of
a large matrix product (forward once, backward twice; the ReLU's mask counts as kept), and the bytes that must be moved (forward:
the maps and the results; backward: the maps and the gradients of both) at the rate of a copy that moves as many. Both rates are
measured in the same run.
"""

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import gsto_ops

from .cases import CASES, Case, Function

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
ATTEMPTS = 3


def make_operands(case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Tensor]:
    """Leaves with gradients; parameters scaled so that every map has values of about one."""
    generator = torch.Generator().manual_seed(0)
    channels = case.shapes[0][1]
    operands = []
    for i, shape in enumerate(case.shapes):
        values = torch.randn(shape, generator=generator)
        if i < case.maps:
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
    maps = operands[: case.maps]
    moved = [*maps, *outputs, *([*maps, *outputs, *maps] if backward else [])]
    others = (2 if backward else 1) * case.other_bytes
    copied = copy_time(sum(t.numel() * t.element_size() for t in moved) + others)
    if not case.multiply_adds:
        return copied
    return max(copied, (3 if backward else 1) * case.multiply_adds / product_rate(maps[0].dtype))


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
