"""``gsto bench step`` and ``gsto bench infer``: whole networks, the gates' cost against the network without them.

The variants of ``gsto bench traffic``, interleaved in one run: eager, on a GPU also replayed from a CUDA graph (what counts
there: eager times of small kernels are bound by the host), and with ``--compile`` under torch.compile. A training step is
forward pass, the heads' losses, backward pass and SGD. On a GPU in bfloat16 autocast, on a CPU in float32.

Before anything is timed, the fused gradients are compared with float64's: their error must not be more than twice that of
the plain composition in the same float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .errors import UsageError
from .kernels.gpu import captured
from .traffic import VARIANTS, Variant

TRUNKS = ("w18_small_v2", "w18", "w32", "w48")


class Bench:
    """One variant: its network and how often it ran.

    Args:
        variant, trunk: the network. device: where. training: a step, or inference.
        images: (N, 3, H, W), channels_last. labels: (N, H, W).
    """

    def __init__(self, variant: Variant, trunk: str, training: bool, images: Tensor, labels: Tensor) -> None:
        self.variant, self.training, self.images, self.labels = variant, training, images, labels
        torch.manual_seed(0)
        network = variant.build(trunk).to(images.device, memory_format=torch.channels_last)
        self.network: nn.Module = network.train(training)
        self.run_network: Callable[[Tensor], Tensor | list[Tensor]] = network
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def loss(self) -> Tensor:
        """Forward pass and losses."""
        device = self.images.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs = self.run_network(self.images)
        return self.variant.loss(outputs if isinstance(outputs, list) else [outputs], self.labels)

    def __call__(self) -> None:
        """One step, or one inference."""
        if not self.training:
            device = self.images.device.type
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                self.run_network(self.images)
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def compile(self) -> float:
        """Seconds until the first compiled run has ended."""
        self.run_network = torch.compile(self.network)
        start = time.perf_counter()
        self()
        synchronize(self.images.device)
        return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(step: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def check_gradients(trunk: str, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The distances of the fused network's and of the plain composition's gradients from float64's, in float64's norm.

    Raises:
        AssertionError: the fused one's is more than twice the plain one's.
    """
    plain = Bench(VARIANTS[1], trunk, True, images, labels)
    state = copy.deepcopy(plain.network.state_dict())
    grads = []
    for variant, dtype in ((VARIANTS[1], torch.float64), (VARIANTS[1], torch.float32), (VARIANTS[2], torch.float32)):
        network = variant.build(trunk).to(images.device, dtype, memory_format=torch.channels_last)
        network.load_state_dict(state)
        variant.loss(network(images.to(dtype)), labels, dtype).backward()
        grads.append(torch.cat([p.grad.flatten().double() for p in network.parameters() if p.grad is not None]))
    composed, fused = (float((grad - grads[0]).norm() / grads[0].norm()) for grad in grads[1:])
    assert fused <= 2 * composed + 1e-6, (
        f"error of the fused gradients: {fused:.1e}, of the plain composition's: {composed:.1e}"
    )
    return fused, composed


def measure(
    trunk: str, batch: int, size: tuple[int, int], training: bool, rounds: int, compiled: bool, device: torch.device
) -> list[dict[str, str | float]]:
    """A row per variant and way to run it: median and spread of its times, and its peak memory on a GPU."""
    images = torch.randn(batch, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 19, (batch, *size), device=device)
    steps: list[tuple[str, str, Callable[[], None], float, float]] = []
    for variant in VARIANTS:
        bench = Bench(variant, trunk, training, images, labels)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        bench()
        synchronize(device)
        first = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
        steps.append((variant.label, "eager", bench, first, peak))
        if device.type == "cuda":
            steps.append((variant.label, "graphed", captured(bench), first, peak))
        if compiled:
            other = Bench(variant, trunk, training, images, labels)
            steps.append((variant.label, "compiled", other, other.compile(), float("nan")))
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for k, (_, _, step, _, _) in enumerate(steps):
            times[k].append(milliseconds(step, device))
    rows: list[dict[str, str | float]] = []
    for (label, way, _, first, peak), values in zip(steps, times, strict=True):
        low, high = min(values), max(values)
        row = {"network": label, "way": way, "ms": statistics.median(values), "min": low, "max": high}
        rows.append({**row, "first_s": first, "peak_gib": peak})
    base = {row["way"]: float(row["ms"]) for row in rows if row["network"] == VARIANTS[0].label}
    for row in rows:
        row["ratio"] = float(row["ms"]) / base[row["way"]]
        row["images_per_s"] = batch / float(row["ms"]) * 1e3
    return rows


def run(argv: Sequence[str], training: bool, description: str) -> None:
    """The command."""
    cuda = torch.cuda.is_available()
    prog = f"gsto bench {'step' if training else 'infer'}"
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument(
        "--trunk", default="w48" if cuda else "w18_small_v2", choices=TRUNKS, help="default: %(default)s"
    )
    parser.add_argument("--batch", type=int, default=8 if cuda else 2, help="images (default: %(default)s)")
    default = (512, 1024) if cuda else (256, 512)
    parser.add_argument("--size", type=int, nargs=2, default=default, metavar=("H", "W"), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20 if cuda else 7, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile (minutes of warm-up)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the results (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    for name, value, low in (
        ("batch", options.batch, 1),
        ("size", min(options.size), 32),
        ("rounds", options.rounds, 1),
    ):
        if value < low:
            raise UsageError(f"--{name} must be at least {low}, got {value}")
    if options.threads is not None:
        if options.threads < 1:
            raise UsageError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if cuda else "cpu")
    small = torch.randn(2, 3, 64, 128, device=device).contiguous(memory_format=torch.channels_last)
    fused, composed = check_gradients(options.trunk, small, torch.randint(0, 19, (2, 64, 128), device=device))
    size = (options.size[0], options.size[1])
    rows = measure(options.trunk, options.batch, size, training, options.rounds, options.compile, device)
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if cuda else cpu
    what = "training step" if training else "inference"
    title = f"{what} of {options.trunk}, {options.batch} x {size[0]}x{size[1]}, {name}, torch {torch.__version__}"
    table = Table("network", "", "ms", "spread", "x plain HRNetV2", "images/s", "first run s", "peak GiB", title=title)
    for row in rows:
        spread = f"{row['min']:.1f} - {row['max']:.1f}"
        cells = (
            f"{row['ms']:.1f}",
            spread,
            f"{row['ratio']:.2f}",
            f"{row['images_per_s']:.1f}",
            f"{row['first_s']:.1f}",
        )
        table.add_row(str(row["network"]), str(row["way"]), *cells, f"{row['peak_gib']:.1f}")
    console = Console(width=130)
    console.print(table)
    console.print(
        f"Checked before: the error of the fused network's float32 gradients is {fused:.1e} of their norm, that of the plain "
        f"composition's {composed:.1e}."
    )
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{'step' if training else 'infer'}-{options.trunk}.json"
    file.write_text(json.dumps({"title": title, "rows": rows}, indent=1))
    console.print(f"Results in {file}")
