"""Opt-in autotuning (``GSTO_AUTOTUNE=1``): the fastest of a few configurations per problem, kept in a user cache."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..tables import Table


def enabled() -> bool:
    return os.environ.get("GSTO_AUTOTUNE") == "1"


def _is_config(value: object) -> bool:
    return isinstance(value, list) and len(value) == 6 and all(type(n) is int and n > 0 for n in value)


TABLE = Table("triton.json", "configurations", _is_config)


def milliseconds(function: Callable[[], Any], repeats: int = 10) -> float:
    """The median time of a call on the GPU, after a first one that compiles; infinite where it asks for too much of the GPU."""
    from triton.runtime.errors import OutOfResources

    try:
        function()
    except OutOfResources:
        return float("inf")
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def fastest(
    key: str,
    candidates: Sequence[Sequence[int]],
    body: Callable[[Any], Any],
    measure: Callable[[Callable[[], Any]], float] = milliseconds,
) -> Sequence[int]:
    """The candidate that the cache names for this key, or the one that ``body`` runs fastest with, which is then remembered."""
    known = TABLE.entries
    if key not in known:
        times = [measure(lambda candidate=candidate: body(candidate)) for candidate in candidates]
        TABLE.write(key, list(candidates[times.index(min(times))]))
    return known[key]
