"""`gsto prepare` and `gsto verify`: data sets made ready, and checked file by file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .camvid import CamVidData
from .cityscapes import CityscapesData
from .datasets import DataError, Found
from .folders import FolderData
from .lip import LIPData
from .pascal_context import LABEL_FOLDER, PascalContextData, convert_annotations
from .verification import find_problems

DATASETS: dict[str, type[FolderData]] = {
    "cityscapes": CityscapesData,
    "lip": LIPData,
    "pascal_context": PascalContextData,
    "camvid": CamVidData,
}


def verify(data: FolderData, splits: Sequence[str], any_count: bool = False) -> bool:
    """Read every file of these splits, print each problem on a line of its own and a table of the splits.

    Args:
        data: the data set.
        splits: names of its splits.
        any_count: accept another number of images than the published one.

    Returns:
        Whether there was no problem.
    """
    rows, good = [], True
    for split in splits:
        try:
            found = data.find_pairs(split)
        except DataError as error:
            found = Found([], list(error.args))
        problems = [*found.problems, *find_problems(data.dataset(found.pairs), f"Reading {split}")]
        for problem in problems:
            print(f"{split}: {problem}")
        published = data.splits[split]
        counted = any_count or len(found.pairs) == published
        good = good and counted and not problems
        if problems:
            state = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        else:
            state = "good" if counted else "not the published number"
        rows.append(f"{split:<10}{len(found.pairs):>8}{published:>12}  {state}")
    print("\n".join([f"{'split':<10}{'found':>8}{'published':>12}", *rows]))
    return good


def write_lists(data: FolderData, splits: Sequence[str], folder: Path) -> list[Path]:
    """Write `<split>.lst`, lines of an image and a label file relative to the data set's root, tab-separated.

    Raises:
        DataError: a split whose files do not pair up.
    """
    files = []
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        pairs = data.open_split(split).pairs
        lines = ["\t".join(str(file.relative_to(data.root)) for file in pair[:2] if file is not None) for pair in pairs]
        files.append(folder / f"{split}.lst")
        files[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def run_verify(argv: Sequence[str], description: str) -> int:
    """`gsto verify`; returns the exit status: 0 where everything is good, else 1."""
    parser = _parser("verify", description)
    parser.add_argument("--splits", nargs="+", help="default: train, val and test if it is there")
    parser.add_argument(
        "--any_count", action="store_true", help="accept another number of images than the published one"
    )
    arguments = parser.parse_args(argv)
    data = DATASETS[arguments.dataset](str(arguments.root))
    splits = arguments.splits or _splits_here(data)
    for split in splits:
        if split not in data.splits:
            parser.error(f"--splits: {arguments.dataset} has no split {split!r}; it has {', '.join(data.splits)}")
    return 0 if verify(data, splits, arguments.any_count) else 1


def run_prepare(argv: Sequence[str], description: str) -> int:
    """`gsto prepare`; returns the exit status: 0 where the data set is ready for training, else 1."""
    parser = _parser("prepare", description)
    parser.add_argument(
        "--annotations", type=Path, help="pascal_context only: trainval_merged.json (default: in the root)"
    )
    parser.add_argument("--lists", type=Path, help="folder for the lists of files (default: lists/ in the root)")
    parser.add_argument(
        "--any_count", action="store_true", help="accept another number of images than the published one"
    )
    arguments = parser.parse_args(argv)
    data = DATASETS[arguments.dataset](str(arguments.root))
    if isinstance(data, PascalContextData):
        written = convert_annotations(data, arguments.annotations or data.root / "trainval_merged.json")
        print("\n".join(f"{data.root / LABEL_FOLDER / split}: {count} labels" for split, count in written.items()))
    elif arguments.annotations is not None:
        parser.error("--annotations: only pascal_context has annotations to convert")
    splits = _splits_here(data)
    if not verify(data, splits, arguments.any_count):
        return 1
    for file in write_lists(data, splits, arguments.lists or data.root / "lists"):
        print(file)
    return 0


def _splits_here(data: FolderData) -> list[str]:
    """The splits to look at unless told otherwise: those for training and evaluation, and others that are there."""
    splits = []
    for split in data.splits:
        if split in ("train", "val"):
            splits.append(split)
            continue
        try:
            data.find_pairs(split)
        except DataError:
            continue  # a test set is often not there, and not needed
        splits.append(split)
    return splits


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    other = "gsto verify coco --help tells about COCO keypoints" if command == "verify" else None
    parser = argparse.ArgumentParser(prog=f"gsto {command}", description=description, epilog=other, allow_abbrev=False)
    parser.add_argument("dataset", choices=DATASETS, help="which data set")
    parser.add_argument("--root", type=Path, required=True, help="its folder")
    return parser
