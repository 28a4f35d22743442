"""Pictures of results: bars side by side, a roofline, and costs over a size with their slopes."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .report import Row


def bars(rows: Sequence[Row], group: str, series: str, value: str, title: str) -> Figure:
    """Horizontal bars of a value, one group per text of the column ``group``, one colour per text of ``series``.

    A row's "low" and "high" are drawn as its whisker where the value is the time that they belong to, "ms".
    """
    groups = list(dict.fromkeys(str(row[group]) for row in rows))
    kinds = list(dict.fromkeys(str(row[series]) for row in rows))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.28 * len(groups) * (len(kinds) + 0.6)), layout="constrained")
    thick = 0.8 / len(kinds)
    for k, kind in enumerate(kinds):
        chosen = [row for row in rows if row[series] == kind]
        at = [groups.index(str(row[group])) - 0.4 + (k + 0.5) * thick for row in chosen]
        values = [float(row[value]) for row in chosen]
        spreads = None
        if value == "ms":
            spreads = np.array([[row["ms"] - row["low"], row["high"] - row["ms"]] for row in chosen], float).T
        drawn = axes.barh(at, values, thick * 0.9, xerr=spreads, label=kind or None, error_kw={"lw": 1, "capsize": 2})
        axes.bar_label(drawn, fmt="%.3g", padding=4, fontsize=8)
    axes.set(yticks=range(len(groups)), yticklabels=groups, xlabel=value, title=title)
    axes.margins(x=0.12)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    if len(kinds) > 1:
        axes.legend(fontsize=8)
    return figure


def roofline(rows: Sequence[Row], series: str, bandwidth: float, rate: float, title: str) -> Figure:
    """What rows reach of the machine, over their arithmetic intensity.

    Args:
        rows: with "ms", "flops" and "bytes" (that have to be moved). series: the column whose texts are the colours.
        bandwidth: bytes per second of a copy. rate: floating-point operations per second of a large matrix product.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    measured = [row for row in rows if float(row["flops"]) > 0 and float(row["ms"]) > 0]
    for kind in dict.fromkeys(str(row[series]) for row in measured):
        chosen = [row for row in measured if row[series] == kind]
        intensity = [float(row["flops"]) / float(row["bytes"]) for row in chosen]
        reached = [float(row["flops"]) / float(row["ms"]) / 1e6 for row in chosen]
        axes.scatter(intensity, reached, s=18, alpha=0.7, label=kind)
    low, high = axes.get_xlim() if measured else (0.1, 1e3)
    x = np.geomspace(max(low, 1e-2), max(high, 2 * rate / bandwidth), 200)
    axes.plot(x, np.minimum(x * bandwidth, rate) / 1e9, color="black", lw=1, label="copy bandwidth, matrix rate")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent p of the fit cost = a * size ** p: 1 is cost in proportion, less is a cost that does not depend on size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def slopes(rows: Sequence[Row], axis: str, series: str, value: str, title: str) -> Figure:
    """Values over the number in the column ``axis``, both logarithmic, one line per text of ``series`` with its exponent."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for kind in dict.fromkeys(str(row[series]) for row in rows):
        points = sorted((float(row[axis]), float(row[value])) for row in rows if row[series] == kind)
        sizes, values = zip(*points, strict=True)
        label = f"{kind}: {axis} ** {slope(sizes, values):.2f}" if len(points) > 1 else kind
        axes.plot(sizes, values, marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=value, title=title)
    sizes = sorted({float(row[axis]) for row in rows})
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
