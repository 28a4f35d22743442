"""How many training images per second one core decodes and augments, and what a loader delivers.

    python -m gsto_benchmarks.segmentation.loading                                # generated files of the data sets' sizes
    python -m gsto_benchmarks.segmentation.loading cityscapes --root CITYSCAPES   # real files

A GPU that trains on N images/s needs about N / (images/s per core) workers (`data.num_workers`).
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from ..images import decode_image, decode_label
from ..sampling import Draw, TrainLoader
from .datasets import Pair, PairDataset
from .folders import FolderData
from .prepare import DATASETS
from .scenes import make_scene
from .transforms import IGNORE

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


def milliseconds(work: Callable[[int], object], count: int, seconds: float) -> float:
    """Median CPU time of `work(index)`, round and round over `count` indices for about so many seconds.

    CPU time: what others do on the machine does not count, only what one core can do.
    """
    times: list[float] = []
    work(0)
    for index in itertools.cycle(range(count)):
        start = time.process_time()
        work(index)
        times.append(time.process_time() - start)
        if len(times) >= 5 and sum(times) > seconds:
            return 1e3 * float(np.median(times))
    raise ValueError("count must be >= 1")


def loader_speed(data: FolderData, pairs: list[Pair], workers: int, seconds: float) -> float:
    """Images per second of a training loader over these files, without the start of its workers."""
    repeated = data.dataset(pairs * (10000 // len(pairs) + 1))
    batches = iter(TrainLoader(repeated, 4, seed=0, num_workers=workers))
    next(batches)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)[0])
    return images / (time.perf_counter() - start)


def measure(data: FolderData, dataset: PairDataset, workers: int, seconds: float) -> dict[str, float]:
    """Milliseconds per sample of the parts of loading, images/s of one core (one process) and of a loader with workers."""
    samples, count = [dataset.read(index) for index in range(len(dataset))], len(dataset)
    pairs = dataset.pairs
    whole = milliseconds(lambda i: dataset[Draw(i % count, i)], count * 16, seconds)
    return {
        "image": milliseconds(lambda i: decode_image(pairs[i].image), count, seconds),
        "label": milliseconds(lambda i: decode_label(pairs[i].label), count, seconds),
        "augment": milliseconds(
            lambda i: data.augment(*samples[i % count][:2], np.random.default_rng(i)), count * 16, seconds
        ),
        "sample": whole,
        "images/s per core": 1e3 / whole,
        f"images/s, {workers} workers": loader_speed(data, pairs, workers, 2 * seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gsto_benchmarks.segmentation.loading", description=__doc__.split("\n")[0]
    )
    parser.add_argument("datasets", nargs="*", help=f"of {', '.join(DATASETS)} (default: all)")
    parser.add_argument("--root", help="folder of the one data set to measure (default: generated files)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--files", type=int, default=8, help="number of files to go round (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the loader (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per figure (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.root is not None and len(arguments.datasets) != 1:
        parser.error("--root needs the name of one data set")
    names = arguments.datasets or list(DATASETS)
    if unknown := set(names) - set(DATASETS):
        parser.error(f"no such data set: {', '.join(unknown)}; there are {', '.join(DATASETS)}")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, OpenCV {cv2.__version__}; CPU milliseconds per sample, median\n"
    )
    for row, name in enumerate(names):
        with tempfile.TemporaryDirectory() as folder:
            data = DATASETS[name](arguments.root or folder)
            if arguments.root is None:
                dataset = make_files(data, name, Path(folder), arguments.files)
            else:
                dataset = data.dataset(data.open_split(arguments.split).pairs[: arguments.files])
            figures = measure(data, dataset, arguments.workers, arguments.seconds)
            shape = "x".join(map(str, dataset.read(0)[1].shape))
        if row == 0:
            print(
                " | ".join(["data set, files", *figures]),
                "-|-".join("-" * 8 for _ in range(len(figures) + 1)),
                sep="\n",
            )
        print(" | ".join([f"{name}, {shape}", *(f"{value:.1f}" for value in figures.values())]))


if __name__ == "__main__":
    main()
