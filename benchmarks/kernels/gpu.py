"""How ``gsto bench ops`` measures time on an NVIDIA GPU: by events, with a flushed L2 cache. Not run on one yet."""

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

import gsto_ops

from .measure import Run, Way


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """A replay of the function's CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # "thread_local": other threads, a loader's that pins memory for one, go on with what a capture does not allow.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


class Gpu:
    """The current GPU."""

    type = "cuda"
    kernels = ("cuda", "triton")
    ways: Mapping[str, Way] = {"plain": lambda call: call, "graph": captured}
    calm = math.inf  # plain launches wait for the host now and then: that is their time

    def times(self, runs: Sequence[Run], rounds: int) -> list[list[float]]:
        """The runs' times in seconds, taken in turn; nothing waits for the host in between."""
        flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")  # H200: 60 MB of L2
        pairs = []
        for _ in range(rounds):
            for run in runs:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with gsto_ops.use_backend(run.backend):
                    flush.zero_()
                    start.record()
                    run.call()
                    end.record()
                pairs.append((start, end))
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [times[k :: len(runs)] for k in range(len(runs))]

    @functools.cache  # noqa: B019  (one Gpu lives as long as the command)
    def product_rate(self, dtype: torch.dtype) -> float:
        """Multiply-adds per second of a large matrix product."""
        size = 8192
        a, b = torch.randn(2, size, size, device="cuda").to(dtype)
        return size**3 / self._median(lambda: a @ b)

    def copy_time(self, count: int) -> float:
        """Seconds for a copy that reads and writes ``count`` bytes together, at the bandwidth of a large one."""
        return count / self._bandwidth

    @functools.cached_property
    def _bandwidth(self) -> float:
        source = torch.empty(2**30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.numel() / self._median(lambda: target.copy_(source))

    def _median(self, call: Callable[[], object]) -> float:
        call()
        return statistics.median(self.times([Run("", "", "auto", call)], 20)[0])

    def undisturbed(self) -> bool:
        """Other programs are not expected on the GPU."""
        return True
