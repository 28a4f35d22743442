"""Opt-in autotuning (``GSTO_AUTOTUNE=1``): the fastest of a few configurations per problem, kept in a user cache.

The cache is one JSON file, ``$XDG_CACHE_HOME/gsto_ops/triton.json`` (``~/.cache`` without the variable), of configurations by
problem. A writer merges its entry into the file's present content under a lock and replaces the file in one step, so readers
never see a part of it; where there are no locks the last writer of a key wins.
"""

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

Config = tuple[int, ...]
_known: dict[Path, dict[str, Config]] = {}  # by file: this process's view of it


def enabled() -> bool:
    return os.environ.get("GSTO_AUTOTUNE") == "1"


def cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gsto_ops" / "triton.json"


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _is_config(value: object) -> bool:
    return isinstance(value, list) and len(value) == 6 and all(type(n) is int and n > 0 for n in value)


def read(path: Path) -> dict[str, Config]:
    """The file's entries; none where it does not exist, and none with a warning where it is damaged."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn_once(f"gsto_ops: autotuning cache {path} cannot be read and is ignored: {error}")
        return {}
    if not isinstance(content, dict) or not all(_is_config(v) for v in content.values()):
        _warn_once(f"gsto_ops: autotuning cache {path} is damaged and is ignored: not a table of configurations")
        return {}
    return {key: tuple(value) for key, value in content.items()}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write(path: Path, key: str, config: Sequence[int]) -> None:
    """Adds an entry. A cache that cannot be written costs a warning, not the call."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            content = {**read(path), key: tuple(config)}
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
                json.dump(content, file, indent=1, sort_keys=True)
            os.replace(file.name, path)
    except OSError as error:
        _warn_once(f"gsto_ops: autotuning cache {path} cannot be written: {error}")


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
    path = cache_file()
    if path not in _known:
        _known[path] = read(path)
    known = _known[path]
    if key not in known:
        times = [measure(lambda candidate=candidate: body(candidate)) for candidate in candidates]
        known[key] = tuple(candidates[times.index(min(times))])
        write(path, key, known[key])
    return known[key]
