"""What ``gsto bench ops --remember`` leaves for ``gsto_ops.measured``: the backend that was fastest, for every kind of call."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from gsto_ops import backends, measured

from ..kernels.cases import Case
from ..kernels.measure import DTYPES, LAYOUTS
from .report import Row

KEYS = ("operator", "case", "layout", "dtype")


def call_of(case: Case, layout: str, dtype: str, device: str) -> measured.Call:
    """The kind of call that a case is."""
    map_of_it = torch.empty(case.shapes[0], dtype=DTYPES[dtype], device=device, memory_format=LAYOUTS[layout])
    return backends.call_of(case.operator, map_of_it)


def fastest(rows: Sequence[Row], calls: Mapping[tuple[str, ...], measured.Call]) -> dict[measured.Call, str]:
    """The backend with the least geometric mean of times over all cases and passes of one kind, of those that have them all.

    Args:
        rows: of ``kernels.measure``; only plain launches of backends count. calls: by operator, case, layout and dtype.
    """
    logs: dict[measured.Call, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        call = calls.get(tuple(str(row[key]) for key in KEYS))
        if call is not None and row["way"] == "plain" and row["contestant"] in measured.BACKENDS:
            logs[call][str(row["contestant"])].append(math.log(float(row["ms"])))
    found = {}
    for call, times in logs.items():
        most = max(map(len, times.values()))
        complete = {name: sum(own) for name, own in times.items() if len(own) == most and not math.isnan(sum(own))}
        if len(complete) > 1:
            found[call] = min(complete, key=complete.__getitem__)
    return found
