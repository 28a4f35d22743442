"""``gsto bench loading``: how many training images per second one core decodes and augments, and what a loader delivers.

    gsto bench loading                                # generated files of the data sets' sizes
    gsto bench loading cityscapes --root CITYSCAPES   # real files

A GPU that trains on N images/s needs about N / (images/s per core) workers (`data.num_workers`); ``gsto bench feed`` measures
whether it gets them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console

from ..errors import UsageError
from ..images import decode_image, decode_label
from ..sampling import Draw, TrainLoader
from ..segmentation.datasets import Pair, PairDataset
from ..segmentation.folders import FolderData
from ..segmentation.prepare import DATASETS
from ..segmentation.scenes import make_scene
from ..segmentation.transforms import IGNORE
from . import pictures, report
from .options import at_least

# Suffix and usual size (height, width) of the images
FILES = {
    "cityscapes": (".png", (1024, 2048)),
    "lip": (".jpg", (400, 250)),
    "pascal_context": (".jpg", (375, 500)),
    "camvid": (".png", (360, 480)),
}


def make_files(data: FolderData, name: str, folder: Path, count: int) -> PairDataset:
    """Write scenes as files of a data set's usual kind and size; labels in its own values."""
    suffix, size = FILES[name]
    values = np.zeros(256, np.uint8)
    values[: data.num_classes] = data.label_values
    values[IGNORE] = IGNORE
    pairs = []
    for index in range(count):
        image, label = make_scene(index, size=size)
        pair = Pair(folder / f"{index}{suffix}", folder / f"{index}_label.png", str(index))
        cv2.imencode(suffix, image[..., ::-1])[1].tofile(pair.image)
        cv2.imencode(".png", values[label])[1].tofile(pair.label)
        pairs.append(pair)
    return data.dataset(pairs)


def cpu_times(work: Callable[[int], object], count: int, seconds: float) -> list[float]:
    """Milliseconds of CPU time of `work(index)`, round and round over `count` indices for about so many seconds.

    CPU time: what others do on the machine does not count, only what one core can do.
    """
    times: list[float] = []
    work(0)
    for index in itertools.cycle(range(count)):
        start = time.process_time()
        work(index)
        times.append(1e3 * (time.process_time() - start))
        if len(times) >= 5 and sum(times) > 1e3 * seconds:
            break
    return times


def loader_speed(data: FolderData, pairs: list[Pair], workers: int, seconds: float) -> float:
    """Images per second of a training loader over these files, without the start of its workers."""
    repeated = data.dataset(pairs * (10000 // len(pairs) + 1))
    batches = iter(TrainLoader(repeated, 4, seed=0, num_workers=workers))
    next(batches)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)[0])
    return images / (time.perf_counter() - start)


def measure(data: FolderData, dataset: PairDataset, workers: int, seconds: float) -> report.Row:
    """CPU time per sample, whole and in parts; images/s of one core (one process) and of a loader with workers."""
    samples, count = [dataset.read(index) for index in range(len(dataset))], len(dataset)
    pairs = dataset.pairs
    whole = report.spread(cpu_times(lambda i: dataset[Draw(i % count, i)], count * 16, seconds))
    parts = {
        "image_ms": lambda i: decode_image(pairs[i % count].image),
        "label_ms": lambda i: decode_label(pairs[i % count].label),
        "augment_ms": lambda i: data.augment(*samples[i % count][:2], np.random.default_rng(i)),
    }
    row: report.Row = {**whole, "images_per_s_core": 1e3 / whole["ms"]}
    row |= {name: report.spread(cpu_times(work, count * 16, seconds))["ms"] for name, work in parts.items()}
    return {**row, "workers": workers, "images_per_s": loader_speed(data, pairs, workers, 2 * seconds)}


COLUMNS = {
    "dataset": "data set",
    "files": "files",
    "ms": "CPU ms per image",
    "spread": "middle half",
    "image_ms": "decode image",
    "label_ms": "label",
    "augment_ms": "augment",
    "images_per_s_core": "images/s per core",
    "workers": "workers",
    "images_per_s": "images/s",
}


def run(argv: Sequence[str], description: str) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="gsto bench loading", description=description, allow_abbrev=False)
    parser.add_argument("datasets", nargs="*", help=f"of {', '.join(DATASETS)} (default: all)")
    parser.add_argument("--root", help="folder of the one data set to measure (default: generated files)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--files", type=int, default=8, help="number of files to go round (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the loader (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per figure (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=report.FOLDER, help="folder of the results (default: %(default)s)")
    options = parser.parse_args(argv)
    at_least(0, workers=options.workers)
    at_least(1, files=options.files)
    if not options.seconds > 0:
        raise UsageError(f"--seconds must be > 0, got {options.seconds}")
    names = options.datasets or list(DATASETS)
    if unknown := set(names) - set(DATASETS):
        raise UsageError(f"no such data set: {', '.join(sorted(unknown))}; there are {', '.join(DATASETS)}")
    if options.root is not None and len(names) != 1:
        raise UsageError(f"--root needs the name of one data set, got {len(options.datasets)}")
    rows: list[report.Row] = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            data = DATASETS[name](options.root or folder)
            if options.root is None:
                dataset = make_files(data, name, Path(folder), options.files)
            else:
                dataset = data.dataset(data.open_split(options.split).pairs[: options.files])
            size = "x".join(map(str, dataset.read(0)[1].shape))
            where: report.Row = {"dataset": name, "files": size, "kind": "real" if options.root else "generated"}
            rows.append({**where, **measure(data, dataset, options.workers, options.seconds)})
    title = "Decoding and augmentation of training images"
    console = Console(width=140)
    report.show(console, title, rows, COLUMNS)
    figure = pictures.bars(rows, "dataset", "kind", "ms", f"{title}: CPU ms per image")
    notes = [f"OpenCV {cv2.__version__}. images/s: of a loader with these workers, without their start."]
    files = report.write(options.out, "loading", title, rows, {"times": figure}, notes)
    console.print(f"Results in {', '.join(map(str, files))}")
    return 0
