"""Reading every file of a data set once, before a run depends on it."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import track

from .datasets import DataError, PairDataset


def find_problems(dataset: PairDataset, title: str) -> Iterator[str]:
    """Read every image and label of a data set; yields one line for each pair that cannot be used, naming the file.

    Args:
        dataset: the data set.
        title: of the progress bar.
    """

    def problem(index: int) -> str | None:
        try:
            dataset.read(index)
        except DataError as error:
            return str(error)
        return None

    count = len(dataset)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
        lines = pool.map(problem, range(count))
        for line in track(lines, title, total=count, transient=True, disable=not sys.stdout.isatty()):
            if line is not None:
                yield line


def check(dataset: PairDataset, title: str) -> None:
    """Raise for a data set with unusable files; a data set that passed is not read again until one of its files changes.

    That it passed is noted in the user's cache folder (`XDG_CACHE_HOME`, by default `~/.cache`), under a fingerprint of the
    files' names, sizes and times of change.

    Args:
        dataset: the data set.
        title: of the progress bar.

    Raises:
        DataError: one or more files cannot be used; it names them.
    """
    note = _cache_folder() / _fingerprint(dataset)
    if note.exists():
        return
    problems = list(find_problems(dataset, title))
    if problems:
        raise DataError(*problems)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{title}: {len(dataset)} pairs, last {dataset.pairs[-1].image}\n", encoding="utf-8")
    except OSError as error:
        warnings.warn(
            f"{note.parent} cannot be written ({error.strerror}): the next run reads all files again", stacklevel=2
        )


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gsto_ops" / "verified"


def _fingerprint(dataset: PairDataset) -> str:
    digest = hashlib.sha256(dataset.table.tobytes())
    for pair in dataset.pairs:
        for file in (pair.image, pair.label):
            if file is not None:
                digest.update(f"{file.resolve()}\0{_state(file)}\n".encode())
    return digest.hexdigest()[:32]


def _state(file: Path) -> Sequence[int]:
    try:
        stat = file.stat()
    except OSError:
        return ()  # the reading will name it
    return stat.st_size, stat.st_mtime_ns
