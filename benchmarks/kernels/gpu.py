"""``python -m gsto_benchmarks.kernels.gpu``: the GPU operators against their memory floor, eager PyTorch and torch.compile.

The cases are those of ``kernels.cases`` at N = 8. Floor = bytes of the operands and results, each moved once, over the copy
bandwidth measured in the same run. Times are medians of launches with a flushed L2 cache; ``graph`` replays a CUDA graph of the
call. A row is timed only after its results were checked against float64. Writes a table and JSON to ``--out``.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import gsto_ops

from .cases import CASES, Case
from .cpu import LAYOUTS, errors, make_operands, results

BATCH = 8
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def milliseconds(function: Callable[[], object], rounds: int = 20) -> float:
    """The median time of a call on the GPU, the L2 cache flushed before each one."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")  # H200: 60 MB of L2
    for _ in range(3):
        function()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """A replay of the function's CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def copy_bandwidth() -> float:
    """Bytes per second of a device copy, reads and writes counted."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3


def moved_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(case: Case, dtype: torch.dtype, layout: str, backward: bool, bandwidth: float, compiled: bool) -> dict:
    """One row. RuntimeError when a backend is less exact than eager PyTorch allows for."""
    maps = [(BATCH, *shape[1:]) for shape in case.shapes[: case.maps]]
    batched = replace(case, shapes=[*maps, *case.shapes[case.maps :]])
    operands = [o.detach().cuda().requires_grad_() for o in make_operands(batched, dtype, LAYOUTS[layout])]
    with torch.no_grad():
        outputs = batched.eager(*operands)
    grads = [torch.randn_like(o) for o in outputs] if backward else None
    # Forward: read the maps, write the outputs. Backward reads the maps and the output gradients, and writes the maps' gradients.
    inputs = operands[: case.maps]
    moved = moved_bytes([*inputs, *outputs]) + BATCH * case.other_bytes
    moved += moved_bytes([*inputs, *inputs, *outputs]) + BATCH * case.other_bytes if backward else 0
    row = {"case": case.name, "layout": layout, "pass": "forward + backward" if backward else "forward"}
    row["dtype"], row["floor ms"] = str(dtype).removeprefix("torch."), moved / bandwidth * 1e3
    row["eager ms"] = milliseconds(lambda: results(batched.eager, operands, grads))
    if compiled:
        function = torch.compile(batched.eager, mode="max-autotune-no-cudagraphs")
        row["compile ms"] = milliseconds(lambda: results(function, operands, grads))
    for backend in ("cuda", "triton"):
        if gsto_ops.backends.why_not(backend):
            continue
        with gsto_ops.use_backend(backend):
            error, eager_error = errors(batched, operands, grads)
            if error > 2 * eager_error + 4 * torch.finfo(dtype).eps:
                raise RuntimeError(
                    f"{backend}, {row}: error {error:.2g} against float64, eager PyTorch has {eager_error:.2g}"
                )
            row[f"{backend} ms"] = milliseconds(lambda: results(batched.ours, operands, grads))
            row[f"{backend} graph ms"] = milliseconds(captured(lambda: results(batched.ours, operands, grads)))
        best = min(row[f"{backend} ms"], row[f"{backend} graph ms"])
        row[f"{backend} x floor"], row[f"{backend} x eager"] = best / row["floor ms"], row["eager ms"] / best
        row[f"{backend} error"], row["eager error"] = error, eager_error
    return row


def as_markdown(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cell = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)  # noqa: E731
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    lines += [f"| {' | '.join(cell(row.get(column, '')) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; default: bfloat16")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile (slow to warm up)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU is visible; kernels.cpu measures the CPU kernels")
    cases = [case for case in CASES if arguments.only in case.name]
    if not cases:
        parser.error(f"--only: no case contains {arguments.only!r}; cases are: {', '.join(c.name for c in CASES)}")
    bandwidth = copy_bandwidth()
    header = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy GB/s": bandwidth / 1e9}
    print(header)
    rows = []
    for case in cases:
        for layout in LAYOUTS:
            for dtype in arguments.dtype or ["bfloat16"]:
                for backward in (False, True):
                    rows.append(measure(case, DTYPES[dtype], layout, backward, bandwidth, arguments.compile))
    table = as_markdown(rows)
    print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "kernels.json").write_text(json.dumps({**header, "rows": rows}, indent=1))
    (arguments.out / "kernels.md").write_text(f"{header}\n\n{table}")


if __name__ == "__main__":
    main()
