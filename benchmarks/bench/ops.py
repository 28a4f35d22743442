"""``gsto bench ops``: every operator by itself, against its floor, eager PyTorch and torch.compile.

Contestants: the backends of ``gsto_ops`` that run on the device, eager PyTorch, and on request torch.compile, of the same steps
as written and reformulated for it. They run in one process, in turn, round after round, on a GPU with a flushed L2 cache and both
as plain launches and as a replayed CUDA graph. What is timed was checked against float64 before: a wrong result has no time, and
ends the command with status 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gsto_ops import backends, measured

from ..errors import TrainingError, UsageError
from ..kernels.cases import Case
from ..kernels.cpu import Cpu
from ..kernels.gpu import Gpu
from ..kernels.measure import COMPILED, DTYPES, LAYOUTS, PASSES, Device, measure
from ..kernels.shapes import CASES, QUICK
from . import choices, pictures, report
from .options import at_least, use_threads

SHORT = {"channels_last": "NHWC", "float32": "f32", "bfloat16": "bf16", "float16": "f16", "forward+backward": "fwd+bwd"}
SHORT |= {"forward": "fwd"}
NOTES = (
    "ms: median; low, high: the middle half of the times. floor: the bytes of maps and results moved once at the rate of a copy, "
    "or the multiply-adds at the rate of a large matrix product, whichever takes longer; both rates are of the same run. "
    "x_floor: ms over the floor. x_eager, x_compile: the time of eager PyTorch, and of the best torch.compile contestant, run in "
    "the same way, over ms. error: against float64, in its norm, the largest of all results. No ms: other programs disturbed it.",
)


def choose(name: str, given: Sequence[str] | None, allowed: Iterable[str], default: Iterable[str]) -> list[str]:
    """What an option names, in the order of ``allowed``.

    Raises:
        UsageError: a value that is not allowed.
    """
    for value in given or ():
        if value not in allowed:
            raise UsageError(f"--{name} takes {', '.join(allowed)}; got {value!r}")
    chosen = default if given is None else given
    return [value for value in allowed if value in chosen]


def choose_contestants(given: Sequence[str] | None, device: Device, quick: bool) -> list[str]:
    """Those asked for, or all that run here without minutes of warm-up; quick: without the reference, which is much like eager.

    Raises:
        UsageError: one that does not exist or does not run here.
    """
    own = [*device.kernels, "reference"]
    for name in given or ():
        if name in own and (reason := backends.why_not(name)):
            raise UsageError(f"--with {name}: it cannot run here: {reason}")
    runs = [name for name in own if backends.why_not(name) is None and not (quick and name == "reference")]
    return choose("with", given, [*own, "eager", *COMPILED], [*runs, "eager"])


def choose_cases(only: str, quick: bool, batch: int) -> list[Case]:
    cases = [case for case in (QUICK if quick else CASES) if only in str(case)]
    if not cases:
        raise UsageError(f"--only: no case contains {only!r}; cases are: {', '.join(map(str, CASES))}")
    return [case.of_images(batch) for case in cases]


def _heading(contestant: str, way: str) -> str:
    return contestant if way == "plain" else f"{contestant} {way}"


def _milliseconds(row: report.Row | None) -> str:
    if row is None:
        return "wrong"
    return "disturbed" if math.isnan(float(row["ms"])) else report.cell(row["ms"])


def as_table(rows: Sequence[report.Row], kernels: Sequence[str]) -> Table:
    """A line per case with the contestants' milliseconds side by side; ratios are of the fastest of the kernels."""
    runs = list(dict.fromkeys((str(row["contestant"]), str(row["way"])) for row in rows))
    headings = [_heading(*run).replace("-", " ") for run in runs]
    ratios = {"x_floor": "x floor", "x_eager": "x eager", "x_compile": "x compile"}
    ratios = {key: text for key, text in ratios.items() if any(not math.isnan(float(row[key])) for row in rows)}
    table = Table(title=str(rows[0]["operator"]), title_justify="left")
    for heading in ("case", "", "floor"):
        table.add_column(heading, no_wrap=True)
    for heading in (*headings, *ratios.values()):
        table.add_column(heading)
    keys = ("case", "layout", "dtype", "pass")
    for case in dict.fromkeys(tuple(str(row[key]) for key in keys) for row in rows):
        lines = {(row["contestant"], row["way"]): row for row in rows if tuple(row[key] for key in keys) == case}
        cells = [_milliseconds(lines.get(run)) for run in runs]
        ours = [row for (name, _), row in lines.items() if name in kernels and not math.isnan(float(row["ms"]))]
        best = min(ours, key=lambda row: float(row["ms"]), default={})
        name, *details = (SHORT.get(text, text) for text in case)
        floor = report.cell(next(iter(lines.values()))["floor_ms"])
        table.add_row(name, " ".join(details), floor, *cells, *(report.cell(best.get(key)) for key in ratios))
    return table


def make_pictures(rows: Sequence[report.Row], device: Device) -> dict[str, Figure]:
    """By name: for every dtype the roofline, and how much faster than eager PyTorch the kernels are."""
    figures = {}
    timed = [row for row in rows if not math.isnan(float(row["ms"]))]
    for dtype in dict.fromkeys(str(row["dtype"]) for row in timed):
        chosen = [row for row in timed if row["dtype"] == dtype]
        bandwidth = 2**28 / device.copy_time(2**28)
        rate = 2 * device.product_rate(DTYPES[dtype])
        figures[f"roofline-{dtype}"] = pictures.roofline(chosen, "contestant", bandwidth, rate, f"operators, {dtype}")
        bars = []
        for row in chosen:
            if row["contestant"] in device.kernels and not math.isnan(float(row["x_eager"])):
                what = _heading(str(row["contestant"]), str(row["way"]))
                series = f"{what}, {SHORT.get(row['layout'], row['layout'])}, {row['pass']}"
                bars.append({**row, "case": f"{row['operator']}\n{row['case']}", "series": series})
        if bars:
            figures[f"x-eager-{dtype}"] = pictures.bars(bars, "case", "series", "x_eager", f"x eager, {dtype}")
    return figures


def show(console: Console, title: str, rows: Sequence[report.Row], device: Device, out: Path) -> None:
    """Print the tables, one per operator, and write the results."""
    for operator in dict.fromkeys(row["operator"] for row in rows):
        console.print(as_table([row for row in rows if row["operator"] == operator], device.kernels))
    console.print(f"{title}; milliseconds; ratios of the fastest kernels.\n{report.describe(report.machine())}")
    files = report.write(out, "ops", title, rows, make_pictures(rows, device), NOTES)
    console.print(f"Results in {', '.join(map(str, files))}")


def run(argv: Sequence[str], description: str) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="gsto bench ops", description=description, allow_abbrev=False)
    names = ("cuda", "triton", "cpu", "reference", "eager", *COMPILED)
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument("--quick", action="store_true", help="few cases, one dtype, about a minute")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--layout", nargs="+", metavar="LAYOUT", help=f"of {', '.join(LAYOUTS)} (default: all)")
    parser.add_argument(
        "--dtype", nargs="+", metavar="DTYPE", help=f"of {', '.join(DTYPES)} (default: all; quick: one of them)"
    )
    parser.add_argument(
        "--pass", nargs="+", dest="passes", metavar="PASS", help=f"of {', '.join(PASSES)} (default: all)"
    )
    parser.add_argument(
        "--with",
        nargs="+",
        dest="contestants",
        metavar="NAME",
        help=f"of {', '.join(names)} (default: all but torch.compile's, which take minutes to warm up)",
    )
    parser.add_argument("--batch", type=int, help="images (default: 1 on a CPU, 8 on a GPU; odd cases have 3)")
    parser.add_argument(
        "--rounds", type=int, help="of all contestants in turn (default: 20 on a GPU, 11 on a CPU, quick: 5)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, timed as processor time)")
    parser.add_argument(
        "--remember", action="store_true", help="name the fastest backends in the user's cache, which gsto_ops follows"
    )
    parser.add_argument("--out", type=Path, default=report.FOLDER, help="folder of the results (default: %(default)s)")
    options = parser.parse_args(argv)

    cuda = torch.cuda.is_available()
    device_type = choose("device", options.device and [options.device], ("cpu", "cuda"), ["cuda" if cuda else "cpu"])[0]
    if device_type == "cuda" and not cuda:
        raise UsageError("--device cuda: no NVIDIA GPU is visible")
    gpu = device_type == "cuda"
    batch = options.batch if options.batch is not None else 8 if gpu else 1
    rounds = options.rounds if options.rounds is not None else 20 if gpu else 5 if options.quick else 11
    at_least(1, batch=batch, rounds=rounds)
    use_threads(options.threads)
    device: Device = Gpu() if gpu else Cpu()
    contestants = choose_contestants(options.contestants, device, options.quick)
    one = ["bfloat16" if gpu else "float32"]
    dtypes = choose("dtype", options.dtype, DTYPES, one if options.quick else DTYPES)
    layouts = choose("layout", options.layout, LAYOUTS, LAYOUTS)
    passes = choose("pass", options.passes, PASSES, PASSES)
    cases = choose_cases(options.only, options.quick, batch)

    todo = [
        (case, layout, dtype, name == "forward+backward")
        for case, layout, dtype, name in product(cases, layouts, dtypes, passes)
        if name == "forward" or case.differentiable
    ]
    if not todo:
        raise UsageError(f"--pass {' '.join(passes)}: {cases[0].operator} has no gradient")

    console = Console(width=150)
    rows: list[report.Row] = []
    wrong: list[str] = []
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("operators", total=len(todo))
            for case, layout, dtype, backward in todo:
                progress.update(task, description=str(case))
                found, refused = measure(case, device, dtype, layout, backward, contestants, rounds)
                rows += found
                wrong += refused
                progress.advance(task)
    finally:  # what was measured before a failure, or before Ctrl-C, is not lost
        show(console, f"operators on {device_type}, {rounds} rounds", rows, device, options.out)
    if options.remember:
        calls = {
            (case.operator, case.name, layout, dtype): choices.call_of(case, layout, dtype, device_type)
            for case, layout, dtype, _ in todo
        }
        found = choices.fastest(rows, calls)
        for call, backend in found.items():
            measured.remember(call, backend)
        console.print(f"{len(found)} choices of a backend in {measured.TABLE.path}")
    if wrong:
        raise TrainingError("\n".join(["results that are wrong, and have no time:", *wrong]))
    return 0
