"""The operators on one CPU thread as fixtures of pytest-benchmark, to compare two states of the code.

    pytest benchmarks/kernels/test_ops.py --benchmark-save before -k "gated_split and channels_last"
    pytest benchmarks/kernels/test_ops.py --benchmark-compare -k "gated_split and channels_last"

Times are processor time. A case is timed only if its result is right.
"""

import re
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import gsto_ops
from gsto_benchmarks.kernels.cases import Case
from gsto_benchmarks.kernels.cpu import Cpu, clock
from gsto_benchmarks.kernels.measure import LAYOUTS, PASSES, make_grads, make_operands, make_runs
from gsto_benchmarks.kernels.shapes import CASES

ONE_IMAGE = [case.of_images(1) for case in CASES]
IDS = [re.sub(r"\W+", "-", str(case)) for case in ONE_IMAGE]  # that -k can name


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark(timer=clock, disable_gc=True)
@pytest.mark.parametrize("contestant", ["cpu", "eager"])
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ONE_IMAGE, ids=IDS)
def test_operator(benchmark: BenchmarkFixture, case: Case, layout: str, direction: str, contestant: str) -> None:
    if direction != "forward" and not case.differentiable:
        pytest.skip(f"{case.operator} has no gradient")
    operands = make_operands(case, torch.float32, LAYOUTS[layout])
    with torch.no_grad():
        grads = make_grads(case.eager(*operands)) if direction != "forward" else None
    runs, wrong = make_runs(case, torch.float32, operands, grads, [contestant], Cpu().ways)
    assert not wrong
    benchmark.group = f"{case}, {layout}, {direction}"
    with gsto_ops.use_backend(runs[0].backend):
        benchmark(runs[0].call)
