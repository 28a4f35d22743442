"""Results of benchmarks: what was measured, on which machine, with which code; as JSON, Markdown and pictures.

A result is a list of rows. In a row the texts say what was measured (network, layout, backend, ...), and the numbers are
what came out. A time is three numbers, of ``spread``. That is all that ``gsto bench compare`` knows of a benchmark.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

import gsto_ops

from ..errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, str | float]
FOLDER = Path("runs/bench")


def spread(times: Sequence[float]) -> dict[str, float]:
    """The median of times in milliseconds ("ms") and the middle half of them ("low", "high"): one slow round moves neither."""
    if len(times) < 2:
        return dict.fromkeys(("ms", "low", "high"), float(times[0]))
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": statistics.median(times), "low": low, "high": high}


def machine() -> dict[str, str | int | None]:
    """What a time depends on: processor, GPU, driver, versions and the revision of this package."""
    gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "gsto_ops": gsto_ops.__version__,
        "revision": _revision(Path(__file__).parent),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _triton_version() -> str | None:
    if find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def _revision(folder: Path) -> str | None:
    """The commit of the code that runs, with "+" where files differ from it; None outside a git checkout."""
    commit = _output(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return None
    return commit + ("+" if _output(["git", "-C", str(folder), "status", "--porcelain", "-uno"]) else "")


def _output(command: list[str]) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe(where: Mapping[str, Any]) -> str:
    """A machine in one line."""
    device = where["gpu"] or f"{where['cpu']}, {where['threads']} of {where['cores']} threads"
    parts = [device, f"torch {where['torch']}"]
    parts += [f"driver {where['driver']}"] * bool(where["driver"]) + [f"triton {where['triton']}"] * bool(
        where["triton"]
    )
    return ", ".join([*parts, f"revision {where['revision'] or 'unknown'}"])


def cell(value: str | float | None) -> str:
    """A value as a table shows it: three digits that count."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, (str, int)):
        return str(value)
    digits = 2 - max(-3, math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:,.{max(0, digits)}f}"


def as_markdown(rows: Sequence[Row]) -> str:
    """A table with a column for everything that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    lines += [f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def show(console: Console, title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print rows as a table. ``columns``: key of a row -> heading; the key "spread" stands for "low" and "high"."""
    table = Table(*columns.values(), title=f"{title}\n{describe(machine())}")
    for row in rows:
        between = f"{cell(row['low'])} - {cell(row['high'])}" if "low" in row else "-"
        table.add_row(*(between if key == "spread" else cell(row.get(key)) for key in columns))
    console.print(table)


def write(
    out: Path,
    name: str,
    title: str,
    rows: Sequence[Row],
    figures: Mapping[str, Figure] | None = None,
    notes: Iterable[str] = (),
) -> list[Path]:
    """Write a benchmark's results as NAME.json, NAME.md and a picture NAME-FIGURE.png for each figure.

    Args:
        out: folder, made where it is missing. name: of the benchmark, for the files. title: one line.
        rows: texts identify, numbers were measured. notes: sentences to stand under the table.

    Returns:
        The files written.

    Raises:
        UsageError: the folder cannot be written to.
    """
    where = machine()
    written = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = {"name": name, "title": title, "written": written, "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}
    numbers = [{key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()} for row in rows]
    text = json.dumps({**record, "machine": where, "notes": list(notes), "rows": numbers}, indent=1)
    pictures = {out / f"{name}-{key}.png": figure for key, figure in (figures or {}).items()}
    images = "".join(f"\n![{file.stem}]({file.name})\n" for file in pictures)
    remarks = "".join(f"\n{note}\n" for note in notes)
    page = f"# {title}\n\n{describe(where)}, {written}\n\n{as_markdown(rows)}{remarks}{images}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(text, encoding="utf-8")
        (out / f"{name}.md").write_text(page, encoding="utf-8")
        for file, figure in pictures.items():
            figure.savefig(file, dpi=110)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error})") from error
    return [out / f"{name}.json", out / f"{name}.md", *pictures]


def read(file: Path) -> dict[str, Any]:
    """A benchmark's results as ``write`` made them.

    Raises:
        UsageError: no such file, or none of ``write``.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"{file}: not a result of gsto bench: {error}") from error
    missing = [key for key in ("name", "machine", "rows") if not isinstance(record, dict) or key not in record]
    if missing:
        raise UsageError(f"{file}: not a result of gsto bench: it has no {', '.join(missing)}")
    return record


def identity(row: Row) -> tuple[str, ...]:
    """What a row measured: its texts."""
    return tuple(value for value in row.values() if isinstance(value, str))
