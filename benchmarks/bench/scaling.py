"""``gsto bench scaling``: how the cost of a training step grows with batch, resolution, width and number of GPUs.

Times are measured; the exponents p of ``cost = a * size ** p`` are fitted to their logarithms. Several GPUs are counted, not
measured: what a step sends from each GPU, for gradients in a ring all-reduce and for the statistics of synchronised batch norms.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import gsto_models

from . import pictures, report
from .options import at_least, use_threads
from .step import Bench, check_gradients, images_to_check, prepare, seconds
from .traffic import VARIANTS

AXES = {"batch": "images", "resolution": "pixels of an image", "width": "channels of the first branch", "gpus": "GPUs"}
WIDTHS = {"w18": 18, "w32": 32, "w48": 48}  # of the same depth
GPUS = (2, 4, 8, 16, 32, 64)
LINK = 450e9  # bytes per second that an H200 sends over NVLink, by its data sheet


def points(axis: str, cuda: bool) -> list[tuple[str, int, tuple[int, int], int]]:
    """What is measured along an axis: trunk, batch, size of the images, and the number that the axis shows."""
    trunk, size = ("w48", (512, 1024)) if cuda else ("w18_small_v2", (128, 256))
    if axis == "batch":
        return [(trunk, n, size, n) for n in ((1, 2, 4, 8) if cuda else (1, 2, 4))]
    if axis == "resolution":
        factors = (1, 2, 4) if cuda else (0.5, 1, 2)
        sizes = [(int(size[0] * f), int(size[1] * f)) for f in factors]
        return [(trunk, 1, s, s[0] * s[1]) for s in sizes]
    small = size if cuda else (64, 128)
    return [(trunk, 2, small, channels) for trunk, channels in WIDTHS.items()]


def measure(axis: str, rounds: int, device: torch.device) -> list[report.Row]:
    """A row per network and point of an axis, the networks of a point in turn, round after round."""
    rows: list[report.Row] = []
    way = "graphed" if device.type == "cuda" else "eager"
    for trunk, batch, size, number in points(axis, device.type == "cuda"):
        images = torch.randn(batch, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 19, (batch, *size), device=device)
        entries = [prepare(Bench(v, trunk, True, images, labels), v.label, way) for v in VARIANTS]
        times: list[list[float]] = [[] for _ in entries]
        for _ in range(rounds):
            for k, entry in enumerate(entries):
                times[k].append(1e3 * seconds(entry.step, device))
        for entry, values in zip(entries, times, strict=True):
            where = {"axis": axis, "trunk": trunk, "input": f"{batch} x {size[0]}x{size[1]}", "network": entry.label}
            rows.append({**where, "way": way, AXES[axis]: number, **report.spread(values), "peak_gib": entry.peak_gib})
    return rows


def communication(trunk: str) -> list[report.Row]:
    """What each of several GPUs sends in a training step of GSTO-HRNet and of plain HRNetV2, counted from their parameters.

    Gradients: float32, each GPU sends ``2 (n - 1) / n`` of them (ring). A batch norm sends mean, variance and count of its
    channels to n - 1 others in the forward pass, and sums two numbers per channel over all GPUs in the backward pass.
    """
    rows: list[report.Row] = []
    for kind in ("hrnetv2", "gsto_hrnet"):
        network = gsto_models.create_model(f"{kind}_{trunk}")
        gradients = sum(p.numel() * 4 for p in network.parameters())
        norms = [m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        for n in GPUS:
            ring = 2 * (n - 1) / n
            gathered, summed = sum((2 * c + 1) * 4 * (n - 1) for c in norms), ring * sum(2 * c * 4 for c in norms)
            where: report.Row = {"axis": "gpus", "trunk": trunk, "input": f"{n} GPUs", "network": kind, AXES["gpus"]: n}
            rows.append({**where, "what": "gradients", "mb": ring * gradients / 1e6, "collectives": 1})
            rows.append(
                {**where, "what": "batch norms", "mb": (gathered + summed) / 1e6, "collectives": 2 * len(norms)}
            )
    for row in rows:
        row["link_ms"] = float(row["mb"]) * 1e6 / LINK * 1e3
    return rows


def fits(rows: Sequence[report.Row], axis: str) -> list[str]:
    """A sentence per network: how its cost grows along the axis."""
    sentences = []
    for network in dict.fromkeys(str(row["network"]) for row in rows):
        chosen = [row for row in rows if row["network"] == network]
        sizes, costs = [float(row[AXES[axis]]) for row in chosen], [float(row["ms"]) for row in chosen]
        sentences.append(f"{network}: ms grow as {AXES[axis]} ** {pictures.slope(sizes, costs):.2f}")
    return sentences


def run(argv: Sequence[str], description: str) -> int:
    """The command."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="gsto bench scaling", description=description, allow_abbrev=False)
    parser.add_argument("--axis", choices=AXES, action="append", help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int, default=20 if cuda else 5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=report.FOLDER, help="folder of the results (default: %(default)s)")
    options = parser.parse_args(argv)
    at_least(1, rounds=options.rounds)
    use_threads(options.threads)
    device = torch.device("cuda" if cuda else "cpu")
    console = Console(width=140)
    rows, notes, figures = [], [], {}
    axes = options.axis or list(AXES)
    if set(axes) != {"gpus"}:
        notes.append(check_gradients("w48" if cuda else "w18_small_v2", *images_to_check(device)))
    for axis in axes:
        title = f"Cost of a training step over {AXES[axis]}"
        if axis == "gpus":
            found = communication("w48")
            columns = {"network": "network", "GPUs": "GPUs", "what": "what", "mb": "MB", "link_ms": "ms at 450 GB/s"}
            columns |= {"collectives": "collectives, at least"}
            title = "What each GPU sends in a training step of W48: counted, not measured"
            gated = [row for row in found if row["network"] == "gsto_hrnet"]
            figures[axis] = pictures.slopes(
                gated, AXES[axis], "what", "mb", "MB that a GPU sends in a step of GSTO-HRNet-W48"
            )
        else:
            found = measure(axis, options.rounds, device)
            notes += fits(found, axis)
            columns = {"trunk": "trunk", "input": "input", "network": "network", "ms": "ms", "spread": "middle half"}
            columns |= {"peak_gib": "peak GiB"}
            figures[axis] = pictures.slopes(found, AXES[axis], "network", "ms", title)
        report.show(console, title, found, columns)
        rows += found
    for note in notes:
        console.print(note)
    files = report.write(options.out, "scaling", "Cost of a training step", rows, figures, notes)
    console.print(f"Results in {', '.join(map(str, files))}")
    return 0
