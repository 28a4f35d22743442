"""gsto bench ops: every operator has a row, a wrong result has none, and the figures are what they are called.

What a GPU does differently (events, flushed cache, captured graphs) is in ``kernels/gpu.py`` and not run here.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gsto_ops
from gsto_benchmarks.bench import choices, ops
from gsto_benchmarks.cli import main
from gsto_benchmarks.kernels import cases, measure
from gsto_benchmarks.kernels.cpu import Cpu
from gsto_benchmarks.kernels.shapes import CASES, QUICK
from gsto_ops import measured
from gsto_ops.ops import library

REPOSITORY = Path(__file__).parents[3]
# An in-place form (name_) is timed as the operator that it is a form of.
OPERATORS = {name for name in vars(library.operators["gsto_ops"]) if "_backward" not in name and not name.endswith("_")}
TINY = [
    cases.transfer("up2 8 -> 4", 8, 4, (4, 4), (8, 8)),
    cases.transfer("down2 8 -> 4", 8, 4, (4, 4), (2, 2)),
    cases.transfer("up2 8 -> 4", 8, 4, (4, 4), (8, 8), relu=True),
    cases.transfer("same size, 8", 8, None, (3, 5), (3, 5)),
    cases.supervised("down2 8 -> 4", 8, 4, 3, (4, 4), (2, 2)),
    cases.class_map("8 -> 3", 8, 3, (4, 4)),
    cases.projection("8 -> 4", 8, 4, (4, 4)),
    cases.affine("down2 8", 8, (4, 4), (2, 2), relu=True),
    replace(cases.training("up2 8 -> 4", 8, 4, (4, 4), (8, 8)), images=3),
    cases.pyramid("8, 7x5", 8, (7, 5), (1, 3)),
    cases.cross_entropy("5 classes", 5, (4, 4), (10, 9)),
    cases.channel_statistics("8", 8, (4, 4)),
    cases.norm_sum("fusion of 3", 8, (8, 8), [(4, 4), (2, 2)], residual=True),
    cases.norm_sum("norm", 8, (8, 8), [(8, 8)]),
    cases.split("2 projections, 1 copy", 8, (4, 4), [2, 3], 1),
    cases.split("2 copies", 8, (4, 4), [], 2),
]
# columns that say what was measured, and what came out
TEXTS = {"operator", "case", "layout", "dtype", "pass", "contestant", "way"}
NUMBERS = {"ms", "low", "high", "gb_per_s", "x_floor", "x_eager", "x_compile", "error", "floor_ms", "flops", "bytes"}


class Called(TorchDispatchMode):
    """The names of the operators of gsto_ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        if namespace == "gsto_ops":
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def operands_of(case, dtype=torch.float64, images=2):
    case = case.of_images(images)
    operands = measure.make_operands(case, dtype, torch.channels_last)
    with torch.no_grad():
        grads = measure.make_grads(case.eager(*operands)) if case.differentiable else None
    return case, operands, grads


@pytest.mark.parametrize("case", TINY, ids=str)
def test_three_forms_are_one_function_that_calls_its_operator(case):
    case, operands, grads = operands_of(case)
    exact = measure.exact_results(case, operands, grads)
    with Called() as called:
        ours = measure.results(case.ours, operands, grads)
    assert measure.error_of(ours, exact) < 1e-12
    assert measure.error_of(measure.results(case.reformulated, operands, grads), exact) < 1e-12
    # supervised is no operator of its own
    assert {name.removeprefix("supervised_") for name in case.operator.split(" + ")} <= called.names


@pytest.mark.parametrize("chosen", [TINY, QUICK, CASES], ids=["tiny", "quick", "all"])
def test_every_operator_has_a_case(chosen):
    named = {name for case in chosen for name in case.operator.split(" + ")}
    assert named == OPERATORS | {"supervised_gated_scale_transfer"}


def test_cases_have_names_of_their_own():
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("form", ["eager", "reformulated"])
@pytest.mark.parametrize("case", TINY, ids=str)
def test_compiler_takes_a_form_as_one_graph(case, form):
    case, operands, grads = operands_of(case, torch.float32)
    torch.compiler.reset()
    function = torch.compile(getattr(case, form), backend="aot_eager", fullgraph=True, dynamic=False)
    exact = measure.exact_results(case, operands, grads)
    assert measure.error_of(measure.results(function, operands, grads), exact) < 1e-5


def test_compiled_contestants_differ_in_form_and_mode(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic, mode: (function, mode))
    case = TINY[0]
    assert [measure.function_of(case, name) for name in measure.COMPILED] == [
        (case.eager, None),
        (case.reformulated, None),
        (case.reformulated, "max-autotune-no-cudagraphs"),
    ]


def bench(monkeypatch, out, *options, chosen=TINY, device="cpu"):
    """The exit status and the rows of a run over these cases."""
    monkeypatch.setattr(ops, "CASES", chosen)
    status = main(["bench", "ops", "--device", device, "--rounds", "3", "--out", str(out), *options])
    return status, json.loads((out / "ops.json").read_text())["rows"]


def test_command(monkeypatch, tmp_path, capsys):
    status, rows = bench(
        monkeypatch, tmp_path, "--batch", "2", "--layout", "channels_last", "--dtype", "float32", "bfloat16"
    )
    assert status == 0
    contestants = {"reference", "eager"} | {"cpu"} & set(gsto_ops.available_backends())
    assert {row["contestant"] for row in rows} == contestants
    passes = sum(1 + case.differentiable for case in TINY)
    assert len(rows) == passes * 2 * len(contestants)
    assert {row["operator"] for row in rows} == {case.operator for case in TINY}
    assert {row["case"].split(", ")[-1] for row in rows if row["case"].startswith("up2")} == {"N = 2", "N = 3"}
    for row in rows:
        assert set(row) == TEXTS | NUMBERS
        assert all(isinstance(row[key], str) for key in TEXTS)
        assert row["x_compile"] is None and 0 <= row["error"] < (1e-5 if row["dtype"] == "float32" else 0.1)
        if row["ms"] is not None:
            assert 0 < row["low"] <= row["ms"] <= row["high"]
            assert row["x_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
    printed = capsys.readouterr().out
    assert "supervised_gated_scale_transfer" in printed and "NHWC bf16 fwd+bwd" in printed
    assert (tmp_path / "ops-roofline-bfloat16.png").is_file()


def test_the_fastest_backend_is_the_one_with_the_least_times_of_all():
    calls = {("op", name, "NCHW", "float32"): kind for name, kind in (("a", "first"), ("b", "first"), ("c", "second"))}
    times = {
        ("a", "cuda"): 2.0,
        ("a", "triton"): 3.0,
        ("b", "cuda"): 6.0,
        ("b", "triton"): 3.0,
        ("a", "reference"): 1.0,
    }
    times |= {("c", "cuda"): 5.0, ("c", "triton"): math.nan, ("c", "reference"): 4.0, ("c", "eager"): 1.0}
    rows = [
        {
            "operator": "op",
            "case": name,
            "layout": "NCHW",
            "dtype": "float32",
            "contestant": who,
            "way": "plain",
            "ms": ms,
        }
        for (name, who), ms in times.items()
    ]
    # triton: 3 * 3 < 2 * 6; the reference has no time for b; graphs and eager PyTorch are no backends
    rows.append({**rows[0], "way": "graph", "ms": 0.1})
    assert choices.fastest(rows, calls) == {"first": "triton", "second": "reference"}


def test_remembered_choices_are_followed(monkeypatch, tmp_path, capsys):
    if "cpu" not in gsto_ops.available_backends():
        pytest.skip("the C++ extension is not there: CPU tensors have one backend")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.choices.cache_clear()
    monkeypatch.setattr(choices, "fastest", lambda rows, calls: dict.fromkeys(calls.values(), "reference"))
    chosen = [TINY[0]]
    monkeypatch.setattr(ops, "CASES", chosen)
    options = ["--device", "cpu", "--rounds", "1", "--layout", "NCHW", "--dtype", "float32", "--pass", "forward"]
    try:
        assert main(["bench", "ops", *options, "--remember", "--out", str(tmp_path)]) == 0
        written = json.loads((tmp_path / "gsto_ops" / "backends.json").read_text())
        assert list(written.values()) == ["reference"]
        assert gsto_ops.backends.select_for("gated_scale_transfer", torch.empty(chosen[0].shapes[0])) == "reference"
    finally:
        measured.choices.cache_clear()
    assert "1 choices of a backend in" in capsys.readouterr().out.replace("\n", " ")


def test_bytes_and_products_are_those_of_the_shapes():
    rows, _ = measure.measure(TINY[0].of_images(3), Cpu(), "float32", "NCHW", True, ["eager"], 1)
    input, output = 3 * 8 * 16, 3 * 4 * 64
    assert rows[0]["bytes"] == 4 * (input + output + input + output + input)
    assert rows[0]["flops"] == 2 * 3 * (3 * 16 * 8 * (4 + 1))  # projection and gate; forward once, backward twice


def test_wrong_result_has_no_time(monkeypatch, tmp_path, capsys):
    def off(*operands):
        return tuple(y * 1.001 for y in TINY[0].ours(*operands))

    def nan(*operands):
        return tuple(y * math.nan for y in TINY[1].ours(*operands))

    broken = [replace(TINY[0], ours=off), replace(TINY[1], ours=nan), TINY[3]]
    status, rows = bench(
        monkeypatch, tmp_path, "--dtype", "float32", "--pass", "forward", "--with", "reference", "eager", chosen=broken
    )
    captured = capsys.readouterr()
    assert status == 1
    lines = captured.err.splitlines()[1:]
    assert [line.split(", N = 1")[0] for line in lines] == [str(case) for case in broken[:2] for _ in measure.LAYOUTS]
    assert all("plain reference: error" in line and "against float64" in line for line in lines)
    assert {row["case"] for row in rows if row["contestant"] == "reference"} == {"same size, 8, N = 1"}
    assert len({row["case"] for row in rows if row["contestant"] == "eager"}) == 3
    assert "wrong" in captured.out


def test_failure_loses_nothing_that_was_measured(monkeypatch, tmp_path):
    def fails(*operands):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        broken = [TINY[3], replace(TINY[0], ours=fails)]
        bench(monkeypatch, tmp_path, "--with", "reference", "--dtype", "float32", chosen=broken)
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {"same size, 8, N = 1"} and len(rows) == 2 * 2


@pytest.mark.gpu
def test_command_on_a_gpu(monkeypatch, tmp_path):
    status, rows = bench(monkeypatch, tmp_path, "--batch", "2", device="cuda")
    assert status == 0
    assert {row["way"] for row in rows} == {"plain", "graph"}
    assert {row["contestant"] for row in rows} >= {"reference", "eager"}
    assert all(row["ms"] > 0 for row in rows)


class Scripted(Cpu):
    """Times that are given: of every run all rounds."""

    def __init__(self, ways, times):
        super().__init__()
        self.ways, self.given, self.asked = ways, times, 0

    def times(self, runs, rounds):
        self.asked += 1
        assert [(run.contestant, run.way) for run in runs] == list(self.given)
        return [times[:rounds] for times in self.given.values()]


def test_ratios_are_of_one_way_to_run(monkeypatch):
    monkeypatch.setattr(measure, "COMPILED", {"reference": "stands for a compiled function"})
    device = Scripted(
        {"plain": lambda call: call, "graph": lambda call: call},
        {
            ("reference", "plain"): [4e-3] * 3,
            ("reference", "graph"): [2e-3] * 3,
            ("eager", "plain"): [6e-3, 5e-3, 9e-3],
            ("eager", "graph"): [1e-3] * 3,
        },
    )
    monkeypatch.setattr(measure, "function_of", lambda case, contestant: case.eager)
    rows, wrong = measure.measure(
        TINY[0].of_images(1), device, "float32", "NCHW", False, ["reference", "eager"], rounds=3
    )
    found = {(row["contestant"], row["way"]): row for row in rows}
    assert not wrong and device.asked == 1
    assert found["eager", "plain"]["ms"] == pytest.approx(6)
    assert found["reference", "plain"]["x_eager"] == pytest.approx(6 / 4)
    assert found["reference", "graph"]["x_eager"] == pytest.approx(1 / 2)
    assert found["eager", "graph"]["x_compile"] == pytest.approx(2 / 1)


def test_wrong_graph_is_refused():
    def stale(call):
        call()
        return lambda: call.kept[0].mul_(2)  # what a replay leaves that does not do its work

    rows, wrong = measure.make_runs(*prepared(TINY[0]), ["reference"], {"plain": lambda call: call, "graph": stale})
    assert [run.way for run in rows] == ["plain"] and "graph reference: error 1" in wrong[0]


def prepared(case):
    case, operands, _ = operands_of(case, torch.float32)
    return case, torch.float32, operands, None


def test_disturbed_times_are_tried_again_and_left_out():
    given = {("reference", "plain"): [1e-3, 5e-3, 5e-3], ("eager", "plain"): [1e-3, 1e-3, 9e-3]}
    device = Scripted({"plain": lambda call: call}, given)
    rows, _ = measure.measure(TINY[0].of_images(1), device, "float32", "NCHW", False, ["reference", "eager"], rounds=3)
    assert device.asked == measure.ATTEMPTS
    assert math.isnan(rows[0]["ms"]) and math.isnan(rows[0]["x_eager"]) and rows[0]["error"] < 1e-6
    assert rows[1]["ms"] == pytest.approx(1)
    table = ops.as_table(rows, ("reference",))
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["reference"] == ["disturbed"] and cells["eager"] == ["1.00"] and cells["x floor"] == ["-"]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--with", "cudnn"],
            "--with takes cpu, reference, eager, compile, compile-reformulated, compile-max-autotune",
        ),
        (["--with", "triton"], "--with takes cpu, reference"),
        (["--layout", "NHCW"], "--layout takes NCHW, channels_last; got 'NHCW'"),
        (["--dtype", "float64"], "--dtype takes float32, bfloat16, float16; got 'float64'"),
        (["--pass", "backward"], "--pass takes forward, forward+backward; got 'backward'"),
        (["--only", "convolution"], "--only: no case contains 'convolution'; cases are: affine_scale_transfer: "),
        (
            ["--only", "statistics", "--pass", "forward+backward"],
            "--pass forward+backward: channel_statistics has no gradient",
        ),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--device", "tpu"], "--device takes cpu, cuda; got 'tpu'"),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    assert main(["bench", "ops", "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_named(capsys):
    assert main(["bench", "ops", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "gsto: --device cuda: no NVIDIA GPU is visible\n"


def test_backend_that_is_not_built_is_named(monkeypatch, capsys):
    monkeypatch.setattr(ops.backends, "why_not", lambda backend: "it is not built")
    assert main(["bench", "ops", "--device", "cpu", "--with", "cpu"]) == 2
    assert capsys.readouterr().err == "gsto: --with cpu: it cannot run here: it is not built\n"


def test_pytest_benchmark_times_a_case(tmp_path):
    file = tmp_path / "times.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/kernels/test_ops.py"]
    command += ["-k", "130-1x1 and relu and NCHW and eager", "--benchmark-max-time", "0.01"]
    command += ["--benchmark-json", str(file), "--benchmark-only"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())["benchmarks"]
    assert [one["params"]["direction"] for one in found] == ["forward", "forward+backward"]
    assert all(one["stats"]["median"] > 0 and "affine_scale_transfer" in one["group"] for one in found)
