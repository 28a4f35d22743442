"""``gsto bench compare``: two results, or two revisions of the code, row by row.

    gsto bench compare before/step-w48.json runs/bench/step-w48.json
    gsto bench compare main HEAD -- ops --quick      # builds both revisions, runs them in turn, twice each

A row is slower or faster where the middle halves of its times do not overlap and the medians differ by more than ``--tolerance``.
Ends with status 1 where a row became slower, so that a script can stop there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import TrainingError, UsageError
from .report import Row, describe, identity, read

SOURCE = Path(__file__).resolve().parents[2]
MEASURED = ("ops", "step", "infer", "scaling", "loading", "feed")  # what writes one result
TURNS = 2  # of the revisions: what drifts on the machine meets both


def verdict(old: Row, new: Row, tolerance: float) -> str:
    """Whether a row became "slower", "faster" or neither ("")."""
    if float(new["ms"]) > float(old["ms"]) * (1 + tolerance) and float(new["low"]) > float(old["high"]):
        return "slower"
    if float(old["ms"]) > float(new["ms"]) * (1 + tolerance) and float(old["low"]) > float(new["high"]):
        return "faster"
    return ""


def timed(record: dict[str, Any]) -> dict[tuple[str, ...], Row]:
    """The rows with a time, by what they measured.

    Raises:
        UsageError: two rows that say the same of themselves.
    """
    rows: dict[tuple[str, ...], Row] = {}
    for row in record["rows"]:
        if row.get("ms") is None:
            continue
        if identity(row) in rows:
            raise UsageError(f"{record['name']}: two rows say that they are {', '.join(identity(row))}")
        rows[identity(row)] = row
    return rows


def merged(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of one benchmark as one: the mean of a row's medians, and all its spreads together."""
    runs = [timed(record) for record in records]
    rows = []
    for key, row in runs[0].items():
        others = [run[key] for run in runs if key in run]
        mean = sum(float(other["ms"]) for other in others) / len(others)
        low, high = min(float(other["low"]) for other in others), max(float(other["high"]) for other in others)
        rows.append({**row, "ms": mean, "low": low, "high": high})
    return {**records[0], "rows": rows}


def compare(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> tuple[Table, list[tuple[str, ...]]]:
    """A table of the rows that both results have, and which of them became slower.

    Raises:
        UsageError: results of different benchmarks, or without a row in common.
    """
    if old["name"] != new["name"]:
        raise UsageError(f"the results are of different benchmarks: {old['name']} and {new['name']}")
    before, after = timed(old), timed(new)
    common = [key for key in before if key in after]
    if not common:
        raise UsageError(f"{old['name']}: no row is in both results")
    constant = [column for column in zip(*common, strict=True) if len(set(column)) == 1] if len(common) > 1 else []
    table = Table(
        "row", "ms", "middle half", "ms", "middle half", "new / old", "", title=f"{old.get('title', old['name'])}"
    )
    slower = []
    for key in common:
        a, b = before[key], after[key]
        word = verdict(a, b, tolerance)
        slower += [key] * (word == "slower")
        style = {"slower": "bold red", "faster": "green"}.get(word)
        label = ", ".join(text for text in key if text and not any(text == column[0] for column in constant))
        cells = [(f"{float(r['ms']):.4g}", f"{float(r['low']):.4g} - {float(r['high']):.4g}") for r in (a, b)]
        table.add_row(label, *cells[0], *cells[1], f"{float(b['ms']) / float(a['ms']):.3f}", word, style=style)
    return table, slower


def measure_revisions(revisions: Sequence[str], benchmark: Sequence[str]) -> list[dict[str, Any]]:
    """Build revisions of this checkout, each in a folder of its own, and run a benchmark on them in turn.

    Raises:
        UsageError: no checkout, no such revision, or a benchmark that writes no result.
        TrainingError: a build or a run failed.
    """
    commits = [_commit(revision) for revision in revisions]
    with tempfile.TemporaryDirectory() as folder:
        sites = {commit: _build(commit, Path(folder)) for commit in dict.fromkeys(commits)}
        records: list[list[dict[str, Any]]] = [[] for _ in commits]
        for turn in range(TURNS):
            for k, commit in enumerate(commits):
                print(f"running {revisions[k]}, turn {turn + 1} of {TURNS}", flush=True)
                out = Path(folder, f"out{k}-{turn}")
                command = [sys.executable, "-m", "gsto_benchmarks", "bench", *benchmark, "--out", str(out)]
                _call(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(sites[commit])})
                files = sorted(out.glob("*.json"))
                if len(files) != 1:
                    raise UsageError(f"gsto bench {' '.join(benchmark)} wrote {len(files)} results, need one")
                record = read(files[0])
                records[k].append({**record, "machine": {**record["machine"], "revision": commit[:12]}})
        return [merged(runs) for runs in records]


def _commit(revision: str) -> str:
    command = ["git", "-C", str(SOURCE), "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise UsageError(f"{revision}: neither a file nor a git revision of {SOURCE}")
    return found.stdout.strip()


def _build(commit: str, folder: Path) -> Path:
    """Install a commit with its compiled operators; returns the folder to import it from."""
    print(f"building {commit[:12]}", flush=True)
    archive, source, site = folder / f"{commit}.zip", folder / f"{commit}-source", folder / commit
    _call(["git", "-C", str(SOURCE), "archive", "--output", str(archive), commit])
    with zipfile.ZipFile(archive) as files:
        files.extractall(source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    _call([*pip, "--target", str(site), str(source)])
    return site


def _call(command: list[str], **options: Any) -> None:
    """Raises TrainingError with the end of what a program printed where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise TrainingError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()[-2000:]}")


def run(argv: Sequence[str], description: str) -> int:
    """The command; returns 1 where a row became slower."""
    argv, benchmark = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    usage = "gsto bench compare OLD NEW [--tolerance SHARE] [-- BENCHMARK [options]]"
    parser = argparse.ArgumentParser("gsto bench compare", usage, description, allow_abbrev=False)
    parser.add_argument("old", metavar="OLD", help="JSON file of a benchmark, or a git revision")
    parser.add_argument("new", metavar="NEW", help="the same")
    parser.add_argument("--tolerance", type=float, default=0.03, help="difference that does not count (default: 0.03)")
    options = parser.parse_args(argv)
    if not options.tolerance >= 0:
        raise UsageError(f"--tolerance must be >= 0, got {options.tolerance}")
    if benchmark:
        if benchmark[0] not in MEASURED:
            raise UsageError(f"-- needs a benchmark: one of {', '.join(MEASURED)}, got {benchmark[0]!r}")
        old, new = measure_revisions([options.old, options.new], benchmark)
    else:
        for name in (options.old, options.new):
            if not Path(name).is_file():
                raise UsageError(
                    f"{name}: no such file; to compare git revisions add the benchmark: -- step, or -- ops --quick"
                )
        old, new = read(Path(options.old)), read(Path(options.new))
    table, slower = compare(old, new, options.tolerance)
    console = Console(width=140)
    console.print(f"old: {describe(old['machine'])}\nnew: {describe(new['machine'])}")
    console.print(table)
    counts = [len(timed(record).keys() - timed(other).keys()) for record, other in ((old, new), (new, old))]
    if any(counts):
        console.print(f"Rows in one result only: {counts[0]} in the old, {counts[1]} in the new")
    differences = [
        key for key in ("cpu", "threads", "gpu", "driver", "torch") if old["machine"][key] != new["machine"][key]
    ]
    if differences:
        console.print(f"[yellow]The machines differ in {', '.join(differences)}: times do not compare[/yellow]")
    console.print(f"{len(slower)} of {table.row_count} rows are slower" if slower else "No row is slower")
    return 1 if slower else 0
