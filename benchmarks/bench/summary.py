"""``gsto bench summary``: the results in a folder on one screen: a line per operator and contestant, a line per network."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import UsageError
from .report import FOLDER, Row, cell, describe, read

COLUMNS = ("operator", "contestant", "way", "dtype", "pass")


COLUMNS = ("operator", "contestant", "way", "dtype", "pass")


def operators(rows: Sequence[Row]) -> Table:
    """Of every operator and contestant but eager: how many cases, their median and worst ratios, and their largest error."""
    table = Table(*COLUMNS, "timed", "x floor", "worst", "x eager", "worst", "error")
    rows = [row for row in rows if row["contestant"] != "eager"]
    for key in dict.fromkeys(tuple(row[column] for column in COLUMNS) for row in rows):
        chosen = [row for row in rows if tuple(row[column] for column in COLUMNS) == key]
        timed = [row for row in chosen if row["ms"] is not None]
        cells = [f"{len(timed)} of {len(chosen)}"]
        for ratio, worst in (("x_floor", max), ("x_eager", min)):
            values = [float(row[ratio]) for row in timed if row[ratio] is not None]
            cells += [cell(statistics.median(values)), cell(worst(values))] if values else ["-", "-"]
        table.add_row(*map(str, key), *cells, cell(max(float(row["error"]) for row in chosen)))
    return table


def networks(rows: Sequence[Row]) -> Table:
    """The rows of ``gsto bench step`` and ``gsto bench infer``."""
    table = Table("run", "trunk, input", "network", "way", "ms", "x plain HRNetV2", "images/s", "peak GiB", "kernels")
    for row in rows:
        numbers = [cell(row[key]) for key in ("ms", "ratio", "images_per_s", "peak_gib", "kernels")]
        table.add_row(
            str(row["run"]), f"{row['trunk']}, {row['input']}", str(row["network"]), str(row["way"]), *numbers
        )
    return table


def run(argv: Sequence[str], description: str) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="gsto bench summary", description=description, allow_abbrev=False)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="default: %(default)s")
    folder = parser.parse_args(argv).folder
    records = [read(file) for file in sorted(folder.glob("*.json"))]
    if not records:
        raise UsageError(f"{folder}: no results of gsto bench in it")
    console = Console(width=140)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_name.setdefault(record["name"].split("-")[0], []).append(record)
    for name, found in by_name.items():
        rows = [row for record in found for row in record["rows"]]
        if name == "ops":
            console.print(operators(rows))
        elif name in ("step", "infer"):
            console.print(networks(rows))
        else:
            console.print(f"{found[0]['title']}: {', '.join(str(folder / record['name']) + '.md' for record in found)}")
    for line in dict.fromkeys(describe(record["machine"]) for record in records):
        console.print(line)
    return 0
