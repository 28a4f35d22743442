"""`gsto verify coco`: the annotation files, the detectors' boxes and every image, checked."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import track

from ..errors import DataError
from ..images import decode_image
from .annotations import Person, Picture, read_detections
from .coco import CocoData, Split

PUBLISHED_IMAGES = {"train": 118_287, "val": 5_000, "test": 20_288}


def find_problems(pictures: Sequence[Picture], title: str) -> Iterator[str]:
    """Read images; yields a line for each that is missing, broken or of another size than annotated."""

    def problem(picture: Picture) -> str | None:
        try:
            size = decode_image(picture.file).shape[:2]
        except DataError as error:
            return str(error)
        if size != picture.size:
            return "{}: {}x{} instead of {}x{} (height x width)".format(picture.file, *size, *picture.size)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
        lines = pool.map(problem, pictures)
        for line in track(lines, title, total=len(pictures), transient=True, disable=not sys.stdout.isatty()):
            if line is not None:
                yield line


def verify(data: CocoData, splits: Sequence[str], any_count: bool = False) -> bool:
    """Check splits, print each problem on a line of its own and a table of the splits.

    Args:
        data: the data set.
        splits: of "train", "val" and "test".
        any_count: accept another number of images than the published one.

    Returns:
        Whether there was no problem.
    """
    rows, good = [], True
    for split in splits:
        problems: list[str] = []
        pictures: dict[int, Picture] = {}
        people: list[Person] = []
        boxes: list[Person] = []
        skipped: Counter[str] = Counter()
        try:
            annotations = data.annotations(split)
            pictures, people, skipped = annotations.pictures, annotations.people, annotations.skipped
            if split != "train" and (split == "test" or data.detections_file(split).is_file()):
                boxes, others = read_detections(data.detections_file(split), pictures, annotations.file)
                skipped = skipped + Counter({f"detected, {reason}": number for reason, number in others.items()})
        except DataError as error:
            problems += error.args
        problems += find_problems(list(pictures.values()), f"Reading {split}")
        print("".join(f"{split}: {problem}\n" for problem in problems), end="")
        counted = any_count or len(pictures) == PUBLISHED_IMAGES[split]
        good = good and counted and not problems
        if problems:
            state = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        else:
            state = "good" if counted else "not the published number"
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in sorted(skipped.items()))
        counts = f"{len(pictures):>9,}{PUBLISHED_IMAGES[split]:>11,}{len(people):>9,}{len(boxes):>9,}"
        rows.append(f"{split:<7}{counts}  {state}" + (f" (left out: {left_out})" if left_out else ""))
    print("\n".join([f"{'split':<7}{'images':>9}{'published':>11}{'persons':>9}{'boxes':>9}", *rows]))
    return good


def run_verify(argv: Sequence[str], description: str) -> int:
    """`gsto verify coco`; returns the exit status: 0 where everything is good, else 1."""
    parser = argparse.ArgumentParser(prog="gsto verify coco", description=description, allow_abbrev=False)
    parser.add_argument("--root", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--splits", nargs="+", choices=PUBLISHED_IMAGES, default=["train", "val"])
    parser.add_argument("--any_count", action="store_true", help="accept another number of images")
    for option, meaning in (
        ("annotations", "file with the split's images and persons"),
        ("images", "folder of its images"),
        ("detections", "file with a detector's boxes"),
    ):
        parser.add_argument(f"--{option}", help=f"{meaning}, relative to the root (default: the published layout)")
    arguments = parser.parse_args(argv)
    own = Split(arguments.annotations, arguments.images, arguments.detections)
    if own != Split() and len(arguments.splits) != 1:
        parser.error("--annotations, --images and --detections are of one split: name it with --splits")
    data = CocoData(str(arguments.root), **dict.fromkeys(arguments.splits, own))
    return 0 if verify(data, arguments.splits, arguments.any_count) else 1
