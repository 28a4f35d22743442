"""How ``gsto bench ops`` measures time on a CPU.

On one thread a time is the thread's own, without that of other programs. On several, other programs make threads wait for each
other for as long as the scheduler likes: ``undisturbed`` tells. Caches are not flushed: the contestants run in turn, so that
each finds them as the others left them. Memory is kept, as far as the C library is glibc: fresh pages for a result of 100 MB take
41 ms on one virtual machine, filling them 3.
"""

import ctypes
import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

import gsto_ops

from .measure import Run, Way

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def clock() -> float:
    """Seconds; on one thread those of the processor."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


class Cpu:
    """The processor, with torch's present number of threads."""

    type = "cpu"
    kernels = ("cpu",)
    ways: Mapping[str, Way] = {"plain": lambda call: call}
    calm = 2.0

    def __init__(self) -> None:
        if platform.libc_ver()[0] == "glibc":  # by itself it returns what is above 32 MB to the system
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)

    def times(self, runs: Sequence[Run], rounds: int) -> list[list[float]]:
        """The runs' times in seconds, taken in turn."""
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for run, own in zip(runs, times, strict=True):
                with gsto_ops.use_backend(run.backend):
                    own.append(seconds(run.call))
        return times

    @functools.cache  # noqa: B019  (one Cpu lives as long as the command)
    def product_rate(self, dtype: torch.dtype) -> float:
        """Multiply-adds per second of a large matrix product; the best of many, as a peak is what the machine can do undisturbed.

        float32: at least half of bfloat16's rate, because an instruction multiplies 32 bfloat16 or 16 float32, and PyTorch's
        float32 product may be far from that (115 of 260 GFLOP/s on one EPYC). float16, multiplied as float32: float32's rate.
        """
        if dtype == torch.float16:
            return self.product_rate(torch.float32)
        size = 1024
        a, b = torch.randn(2, size, size).to(dtype)
        rate = size**3 / min(seconds(lambda: a @ b) for _ in range(15))
        return rate if dtype == torch.bfloat16 else max(rate, self.product_rate(torch.bfloat16) / 2)

    @functools.cache  # noqa: B019
    def copy_time(self, count: int) -> float:
        """Seconds for a copy that reads and writes ``count`` bytes together, the best of many."""
        source = torch.zeros(max(1, count // 2), dtype=torch.uint8)
        to = torch.empty_like(source)
        return min(seconds(lambda: to.copy_(source)) for _ in range(15))

    def undisturbed(self) -> bool:
        """Whether a sum that takes all threads some 20 microseconds takes less than half a millisecond."""
        x = torch.ones(1 << 17)
        return statistics.median(seconds(lambda: torch.add(x, x)) for _ in range(11)) < 5e-4
