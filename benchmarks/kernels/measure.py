"""One case of the kernel benchmarks in one layout, dtype and pass: results checked against float64, then times, then rows.

The floor of a case is the larger of two times that no implementation can beat on this machine: its multiply-adds at the rate of
a large matrix product (forward once, backward twice), and the bytes that must be moved (forward: the maps and the results;
backward: the maps and the gradients of both) at the rate of a copy. Both rates are measured in the same run.
"""

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import gsto_ops

from ..bench.report import Row, spread
from .cases import Case, Function

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = ("forward", "forward+backward")
COMPILED = {
    "compile": "torch.compile of the steps as written",
    "compile-reformulated": "torch.compile of the steps reformulated for it",
    "compile-max-autotune": "the same with mode max-autotune",
}
ATTEMPTS = 3
Call = Callable[[], object]
Way = Callable[[Call], Call]


@dataclass(frozen=True)
class Run:
    """What is timed: a contestant's call in one way, under this backend of gsto_ops; its error was found before."""

    contestant: str
    way: str
    backend: str
    call: Call
    error: float = 0.0


class Device(Protocol):
    """What differs between a CPU and a GPU: ``cpu.Cpu`` and ``gpu.Gpu``."""

    type: str
    kernels: tuple[str, ...]  # the backends that are made for it
    ways: Mapping[str, Way]  # ways to run a call: "plain", and on a GPU as a replayed graph
    calm: float  # how many times the least of its times a median may be, or else other programs disturbed them

    def times(self, runs: Sequence[Run], rounds: int) -> list[list[float]]: ...
    def product_rate(self, dtype: torch.dtype) -> float: ...
    def copy_time(self, count: int) -> float: ...
    def undisturbed(self) -> bool: ...


def make_operands(
    case: Case, dtype: torch.dtype, memory_format: torch.memory_format, device: str = "cpu"
) -> list[Tensor]:
    """Leaves with gradients, then the case's constants. Maps have a mean and a spread of one, and so about have products."""
    generator = torch.Generator(device).manual_seed(0)
    channels = case.shapes[0][1]
    operands = []
    for i, shape in enumerate(case.shapes):
        values = torch.randn(shape, generator=generator, device=device)
        if i < case.maps:
            # a mean that is not zero by itself: errors are relative
            values = (values + 1).contiguous(memory_format=memory_format)
        elif len(shape) == 4:
            values = values / channels**0.5
        values = values.to(torch.promote_types(dtype, torch.float32) if i in case.float32 else dtype)
        operands.append(values.requires_grad_())
    return [*operands, *case.constants(operands[0].detach())]


def make_grads(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the outputs, in their layouts."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.empty_like(o).copy_(torch.randn(o.shape, generator=generator, device=o.device)) for o in outputs]


def results(function: Function, operands: Sequence[Tensor], grads: Sequence[Tensor] | None) -> list[Tensor]:
    """The outputs, and with ``grads`` (one for each output) the gradients of all leaves."""
    if grads is None:
        with torch.no_grad():
            return list(function(*operands))
    outputs = function(*operands)
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    leaves = [operand for operand in operands if operand.requires_grad]
    return [*outputs, *torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs])]


def exact_results(case: Case, operands: Sequence[Tensor], grads: Sequence[Tensor] | None) -> list[Tensor]:
    """Those of eager PyTorch in float64."""
    wide = [o.detach().double().requires_grad_() if o.requires_grad else o for o in operands]
    return results(case.eager, wide, None if grads is None else [g.double() for g in grads])


def error_of(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error over all results: the norm of the difference from float64 over float64's norm."""
    pairs = zip(found, exact, strict=True)
    return max(float((f.detach().double() - e.detach()).norm() / e.detach().norm()) for f, e in pairs)


def allowed_error(case: Case, dtype: torch.dtype, backward: bool, eager_error: float) -> float:
    """What a contestant may be off, given what eager PyTorch is off in the same dtype."""
    eps = torch.finfo(dtype).eps
    # Of the values under a ReLU a share of eps is so near zero that its gradient is a matter of rounding.
    return 2 * eager_error + 4 * eps + (4 * eps**0.5 if backward and case.relu else 0)


def function_of(case: Case, contestant: str) -> Function:
    if contestant == "eager":
        return case.eager
    if contestant not in COMPILED:
        return case.ours
    form = case.eager if contestant == "compile" else case.reformulated
    # CUDA graphs are a way to run any contestant here
    mode = "max-autotune-no-cudagraphs" if contestant == "compile-max-autotune" else None
    return torch.compile(form, dynamic=False, mode=mode)


class Checked:
    """A call of a function that keeps its results until they are released; from then on they are freed at once."""

    def __init__(self, function: Function, operands: Sequence[Tensor], grads: Sequence[Tensor] | None) -> None:
        self.arguments = function, operands, grads
        self.kept: list[Tensor] | None = []

    def __call__(self) -> None:
        found = results(*self.arguments)
        if self.kept is not None:
            self.kept = found

    def release(self) -> list[Tensor]:
        """The results; a graph of the call goes on writing them."""
        found, self.kept = self.kept, None
        assert found is not None
        return found


def make_runs(
    case: Case,
    dtype: torch.dtype,
    operands: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    contestants: Sequence[str],
    ways: Mapping[str, Way],
) -> tuple[list[Run], list[str]]:
    """The contestants that are right, in every way; and a line about each one that is wrong, which gets no time."""
    exact = exact_results(case, operands, grads)
    eager_error = error_of(results(case.eager, operands, grads), exact)
    allowed = allowed_error(case, dtype, grads is not None, eager_error)
    if any(contestant in COMPILED for contestant in contestants):
        torch.compiler.reset()  # all cases of an operator are one function to the compiler, which takes few shapes of it
    runs, wrong = [], []
    for contestant in contestants:
        function = function_of(case, contestant)
        backend = contestant if contestant in gsto_ops.backends.BACKENDS else "auto"
        for way, prepared in ways.items():
            checked = Checked(function, operands, grads)
            with gsto_ops.use_backend(backend):
                call = prepared(checked)
                call()
            error = error_of(checked.release(), exact)
            if contestant == "eager" or error <= allowed:
                runs.append(Run(contestant, way, backend, call, error))
            else:
                wrong.append(
                    f"{case}, {dtype}, {way} {contestant}: error {error:.2g} against float64, eager PyTorch has {eager_error:.2g}"
                )
    return runs, wrong


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def calm_times(device: Device, runs: Sequence[Run], rounds: int) -> list[list[float] | None]:
    """The runs' times; None for what other programs disturbed, every time that it was tried."""
    for _ in range(ATTEMPTS):
        alone = device.undisturbed()
        with no_garbage_collection():
            times = device.times(runs, rounds)
        alone = device.undisturbed() and alone
        calm = [own if alone and statistics.median(own) <= device.calm * min(own) else None for own in times]
        if None not in calm:
            break
    return calm


def measure(
    case: Case,
    device: Device,
    dtype: str,
    layout: str,
    backward: bool,
    contestants: Sequence[str],
    rounds: int,
) -> tuple[list[Row], list[str]]:
    """A row for every contestant and way, and a line for every result that was wrong.

    ms, low, high: median and middle half of the times; NaN where other programs disturbed them. bytes and flops (of products):
    what the floor counts; gb_per_s: these bytes in this time. x_floor: this time over the floor. x_eager, x_compile: the time of
    eager PyTorch, and of the best torch.compile contestant, run in the same way, over this time.
    """
    operands = make_operands(case, DTYPES[dtype], LAYOUTS[layout], device.type)
    with torch.no_grad():
        outputs = case.eager(*operands)
    grads = make_grads(outputs) if backward else None
    maps = operands[: case.maps]
    moved = [*maps, *outputs, *([*maps, *outputs, *maps] if backward else [])]
    count = sum(t.numel() * t.element_size() for t in moved) + (2 if backward else 1) * case.other_bytes
    products = (3 if backward else 1) * case.multiply_adds
    floor = max(device.copy_time(count), products / device.product_rate(DTYPES[dtype]) if products else 0.0)
    del outputs, moved

    runs, wrong = make_runs(case, DTYPES[dtype], operands, grads, contestants, device.ways)
    times = calm_times(device, runs, rounds)
    disturbed = dict.fromkeys(("ms", "low", "high"), math.nan)
    spreads = [spread([1e3 * t for t in own]) if own else disturbed for own in times]
    found = {(run.contestant, run.way): own["ms"] for run, own in zip(runs, spreads, strict=True)}
    rows: list[Row] = []
    for run, own in zip(runs, spreads, strict=True):
        compiled = [ms for (name, way), ms in found.items() if name in COMPILED and way == run.way and ms == ms]
        rows.append(
            {
                "operator": case.operator,
                "case": case.name,
                "layout": layout,
                "dtype": dtype,
                "pass": PASSES[backward],
                "contestant": run.contestant,
                "way": run.way,
                **own,
                "gb_per_s": count / own["ms"] / 1e6,
                "x_floor": own["ms"] / (1e3 * floor),
                "x_eager": found.get(("eager", run.way), math.nan) / own["ms"],
                "x_compile": min(compiled, default=math.nan) / own["ms"],
                "error": run.error,
                "floor_ms": 1e3 * floor,
                "flops": 2 * products,
                "bytes": count,
            }
        )
    return rows, wrong
