"""``gsto bench step`` and ``gsto bench infer``: whole networks, the gates' cost against the network without them.

All networks of a table run in turn, round after round, in one process: eager, on a GPU also replayed from a CUDA graph (what
counts there: eager times of small kernels are bound by the host), and with ``--compile`` under torch.compile. A training step is
forward pass, the heads' losses, backward pass and SGD. Inference also has the networks with their batch norms folded into the
convolutions. On a GPU in bfloat16 autocast, on a CPU in float32.

Nothing is timed before it is checked: the fused network's gradients, or the outputs, against float64.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import gsto_models

from ..kernels.gpu import captured
from . import pictures, report
from .options import at_least, parse_size, use_threads
from .traffic import VARIANTS, Traffic, Variant

TRUNKS = ("w18_small_v2", "w18", "w32", "w48")
COLUMNS = {
    "network": "network",
    "way": "",
    "ms": "ms",
    "spread": "middle half",
    "ratio": "x plain HRNetV2",
    "images_per_s": "images/s",
    "first_s": "first run s",
    "peak_gib": "peak GiB",
    "kernels": "kernels",
}
NOTES = (
    "peak GiB: weights, optimizer and everything that PyTorch's allocator hands out in a run. kernels: on a GPU those that a run "
    "launches, on a CPU the operators that read or write memory. first run s: with capture or compilation.",
)


class Bench:
    """One network and how to run it.

    Args:
        variant, trunk: the network. training: a step, or inference. folded: batch norms as part of the convolutions.
        images: (N, 3, H, W), channels_last. labels: (N, H, W).
    """

    def __init__(
        self, variant: Variant, trunk: str, training: bool, images: Tensor, labels: Tensor, folded: bool = False
    ) -> None:
        self.variant, self.training, self.images, self.labels = variant, training, images, labels
        torch.manual_seed(0)
        network = variant.build(trunk).train(training)
        network = gsto_models.fold(network) if folded else network
        self.network: nn.Module = network.to(images.device, memory_format=torch.channels_last)
        self.run_network: Callable[[Tensor], Tensor | list[Tensor]] = self.network
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def loss(self) -> Tensor:
        """Forward pass and losses."""
        device = self.images.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs = self.run_network(self.images)
        return self.variant.loss(outputs if isinstance(outputs, list) else [outputs], self.labels)

    def infer(self) -> Tensor:
        """The logits."""
        device = self.images.device.type
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            output = self.run_network(self.images)
        assert isinstance(output, Tensor)  # networks in eval mode return the main head's
        return output

    def __call__(self) -> None:
        """One step, or one inference."""
        if not self.training:
            self.infer()
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def held_bytes(self) -> int:
        """Of weights, buffers, gradients and the optimizer's numbers."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        tensors += [p.grad for p in self.network.parameters() if p.grad is not None]
        tensors += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Entry:
    """A line of the table: a network, the way it runs, and what is known of it before the rounds."""

    label: str
    way: str
    step: Callable[[], object]
    first_s: float
    peak_gib: float
    kernels: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def images_to_check(device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels for the checks before the rounds."""
    images = torch.randn(8, 3, 128, 256, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 19, (8, 128, 256), device=device)


def check_gradients(trunk: str, images: Tensor, labels: Tensor) -> str:
    """Compare the fused network's and the plain composition's gradients with float64's; returns the result as a sentence.

    The gradients are those of every two images, taken together: of a fresh network most of the error comes from the few ReLUs
    that rounding opens or closes, and of 2 x 64x128 alone either network's was up to 95 times the other's, depending on the seed.

    Raises:
        AssertionError: the fused one's error is more than twice the plain one's.
    """
    plain = Bench(VARIANTS[1], trunk, True, images, labels)
    state = copy.deepcopy(plain.network.state_dict())
    grads = []
    for variant, dtype in ((VARIANTS[1], torch.float64), (VARIANTS[1], torch.float32), (VARIANTS[2], torch.float32)):
        network = variant.build(trunk).to(images.device, dtype, memory_format=torch.channels_last)
        network.load_state_dict(state)
        parts = []
        for x, y in zip(images.to(dtype).split(2), labels.split(2), strict=True):
            network.zero_grad()
            variant.loss(network(x), y, dtype).backward()
            parts += [p.grad.flatten().double() for p in network.parameters() if p.grad is not None]
        grads.append(torch.cat(parts))
    composed, fused = (float((grad - grads[0]).norm() / grads[0].norm()) for grad in grads[1:])
    assert fused <= 2 * composed + 1e-6, (
        f"error of the fused gradients: {fused:.1e}, of the plain composition's: {composed:.1e}"
    )
    return (
        f"Checked before: the error of the fused network's float32 gradients is {fused:.1e} of their norm, that of the plain "
        f"composition's {composed:.1e}."
    )


def check_outputs(trunk: str, images: Tensor, labels: Tensor) -> str:
    """The same for the outputs in eval mode, of the fused and of the folded network.

    Raises:
        AssertionError: an error of more than twice the plain composition's, and of more than 1e-6.
    """
    exact = VARIANTS[1].build(trunk).to(images.device)
    with torch.no_grad():
        exact(images)  # running statistics that are not 0 and 1
        state = copy.deepcopy(exact.state_dict())
        wide = exact.double().eval()(images.double())
        errors = []
        for variant, folded in ((VARIANTS[1], False), (VARIANTS[2], False), (VARIANTS[2], True)):
            network = variant.build(trunk).to(images.device).eval()
            network.load_state_dict(state)
            network = gsto_models.fold(network) if folded else network
            errors.append(float((network(images).double() - wide).norm() / wide.norm()))
    composed, fused, folded_error = errors
    assert max(fused, folded_error) <= 2 * composed + 1e-6, f"errors of the outputs (plain, fused, folded): {errors}"
    return (
        f"Checked before: the error of the fused network's float32 outputs is {fused:.1e} of their norm, folded "
        f"{folded_error:.1e}, that of the plain composition's {composed:.1e}."
    )


def count_kernels(bench: Bench) -> float:
    """Kernels that a run launches on a GPU; operators that read or write memory on a CPU."""
    if bench.images.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            bench()
            torch.cuda.synchronize()
        return sum(event.device_type == torch.profiler.DeviceType.CUDA for event in profiler.events())
    with Traffic(lambda parents: "all") as traffic:
        bench()
    return sum(traffic.calls.values())


def peak_bytes(bench: Bench, step: Callable[[], object]) -> int:
    """What the network and its optimizer hold, and the most that a run takes on top of that."""
    bench.optimizer.zero_grad(set_to_none=True)
    held = bench.held_bytes()
    if bench.images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return held + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return held + most


def prepare(bench: Bench, label: str, way: str) -> Entry:
    """Run a network for the first time in one of the ways "eager", "graphed", "compiled", "compiled, graphed"."""
    device = bench.images.device
    if "compiled" in way:
        bench.run_network = torch.compile(bench.network)
    step: Callable[[], object] = bench
    start = time.perf_counter()
    if "graphed" not in way:
        seconds(bench, device)
        first = time.perf_counter() - start
        peak = peak_bytes(bench, bench)
    else:
        # A graph's memory is taken while it is captured, and stays its own.
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - bench.held_bytes()
        step = captured(bench)
        seconds(step, device)
        first, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
    kernels = count_kernels(bench) if way == "eager" else float("nan")
    return Entry(label, way, step, first, peak / 2**30, kernels)


def check_compiled(bench: Bench, reference: Bench) -> None:
    """RuntimeError where torch.compile changes a network's loss or logits by more than rounding does."""
    with torch.no_grad():
        found, expected = (b.loss() if b.training else b.infer() for b in (bench, reference))
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    allowed = 5e-2 if bench.images.device.type == "cuda" else 1e-3
    if not error <= allowed:
        raise RuntimeError(f"{bench.variant.label}: under torch.compile the result is off by {error:.1e} of its norm")


def measure(
    trunk: str, batch: int, size: tuple[int, int], training: bool, rounds: int, compiled: bool, device: torch.device
) -> list[report.Row]:
    """A row per network and way to run it."""
    images = torch.randn(batch, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 19, (batch, *size), device=device)
    ways = ["eager", *["graphed"] * (device.type == "cuda"), *["compiled"] * compiled]
    ways += ["compiled, graphed"] * (compiled and device.type == "cuda")
    contestants = [(variant, variant.label, False) for variant in VARIANTS]
    if not training:
        contestants += [(variant, f"{variant.label}, folded", True) for variant in (VARIANTS[0], VARIANTS[2])]
    entries = []
    for variant, label, folded in contestants:
        for way in ways:
            bench = Bench(variant, trunk, training, images, labels, folded)
            entries.append(prepare(bench, label, way))
            if "compiled" in way:
                check_compiled(bench, Bench(variant, trunk, training, images, labels, folded))
    times: list[list[float]] = [[] for _ in entries]
    for _ in range(rounds):
        for k, entry in enumerate(entries):
            times[k].append(1e3 * seconds(entry.step, device))
    rows: list[report.Row] = []
    fixed = {
        "run": "training step" if training else "inference",
        "trunk": trunk,
        "input": f"{batch} x {size[0]}x{size[1]}",
    }
    for entry, values in zip(entries, times, strict=True):
        row: report.Row = {**fixed, "network": entry.label, "way": entry.way, **report.spread(values)}
        rows.append({**row, "first_s": entry.first_s, "peak_gib": entry.peak_gib, "kernels": entry.kernels})
    base = {row["way"]: float(row["ms"]) for row in rows if row["network"] == VARIANTS[0].label}
    for row in rows:
        row["ratio"] = float(row["ms"]) / base[row["way"]]
        row["images_per_s"] = batch / float(row["ms"]) * 1e3
    return rows


def run(argv: Sequence[str], description: str) -> int:
    """``gsto bench step``."""
    return _run(argv, description, training=True)


def run_inference(argv: Sequence[str], description: str) -> int:
    """``gsto bench infer``."""
    return _run(argv, description, training=False)


def _run(argv: Sequence[str], description: str, training: bool) -> int:
    cuda = torch.cuda.is_available()
    name = "step" if training else "infer"
    parser = argparse.ArgumentParser(prog=f"gsto bench {name}", description=description, allow_abbrev=False)
    trunk, size = ("w48", "512x1024") if cuda else ("w18_small_v2", "256x512")
    parser.add_argument("--trunk", default=trunk, choices=TRUNKS, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8 if cuda else 2, help="images (default: %(default)s)")
    parser.add_argument("--size", default=size, metavar="HxW", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20 if cuda else 11, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile (minutes of warm-up)")
    parser.add_argument("--out", type=Path, default=report.FOLDER, help="folder of the results (default: %(default)s)")
    options = parser.parse_args(argv)
    at_least(1, batch=options.batch, rounds=options.rounds)
    use_threads(options.threads)
    height, width = parse_size(options.size)
    device = torch.device("cuda" if cuda else "cpu")
    check = check_gradients if training else check_outputs
    checked = check(options.trunk, *images_to_check(device))
    rows = measure(options.trunk, options.batch, (height, width), training, options.rounds, options.compile, device)
    what = "Training step" if training else "Inference"
    title = f"{what} of {options.trunk}, {options.batch} x {height}x{width}"
    console = Console(width=140)
    report.show(console, title, rows, COLUMNS)
    console.print(checked)
    figure = pictures.bars(rows, "network", "way", "ms", title)
    files = report.write(options.out, f"{name}-{options.trunk}", title, rows, {"times": figure}, (*NOTES, checked))
    console.print(f"Results in {', '.join(map(str, files))}")
    return 0
