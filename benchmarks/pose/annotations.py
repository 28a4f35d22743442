"""COCO's JSON files: keypoint annotations, image lists and detectors' boxes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from .boxes import clip_box
from .keypoints import COUNT

PERSON = 1  # COCO's category id

Box = tuple[float, float, float, float]


class Picture(NamedTuple):
    """An image of an annotation file: its id, file and (height, width)."""

    id: int
    file: Path
    size: tuple[int, int]


class Person(NamedTuple):
    """Somebody to find.

    Attributes:
        picture: the image.
        box: (left, top, width, height) in pixels.
        score: of the box: the detector's, or 1.
        keypoints: (17, 3) float64, x, y and visibility (0: not labelled, 1: hidden, 2: visible); None where unknown.
    """

    picture: Picture
    box: Box
    score: float = 1.0
    keypoints: np.ndarray | None = None


@dataclass
class Annotations:
    """An annotation file.

    Attributes:
        file: where it was read from.
        pictures: by image id.
        people: those to learn from: with labelled keypoints and an area, no crowds, boxes clipped to the image.
        records: all annotations of persons as COCOeval wants them, but with keypoints (17, 3), and numbered from 1: it takes
            a match with id 0 for none, and knows only one annotation of an id.
        skipped: the annotations that are not in `people`: reason -> number.
    """

    file: Path
    pictures: dict[int, Picture]
    people: list[Person] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def read_annotations(file: Path, folder: Path) -> Annotations:
    """Read `person_keypoints_*.json`, or an `image_info_*.json`, which lists images only.

    Args:
        file: JSON.
        folder: of the images.

    Raises:
        DataError: the file is missing or malformed; the message names it and the entry.
    """
    content = _read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f'{file}: must be a JSON object with a list "images" (and "annotations")')
    found = Annotations(file, {})
    for place, entry in _entries(file, content["images"], "images", ("id", "file_name", "height", "width")):
        size = _integer(place, entry, "height"), _integer(place, entry, "width")
        number = _integer(place, entry, "id")
        if min(size) < 1:
            raise DataError(f"{place}: height and width must be >= 1, got {size}")
        if number in found.pictures:
            raise DataError(f"{place}: image id {number} is there twice")
        found.pictures[number] = Picture(number, folder / str(entry["file_name"]), size)
    keys = ("image_id", "category_id", "bbox", "keypoints")
    for place, entry in _entries(file, content.get("annotations", []), "annotations", keys):
        if entry["category_id"] == PERSON:
            _add(found, place, entry)
    return found


def _add(found: Annotations, place: str, entry: dict[str, Any]) -> None:
    picture = found.pictures.get(_integer(place, entry, "image_id"))
    if picture is None:
        raise DataError(f"{place}: there is no image with the id {entry['image_id']!r} in the file")
    box = _box(place, entry)
    keypoints = _numbers(place, entry, "keypoints", 3 * COUNT).reshape(COUNT, 3)
    area = entry.get("area", 0)
    if not isinstance(area, int | float) or not np.isfinite(area):
        raise DataError(f"{place}: area must be a number, got {area!r}")
    crowd = bool(entry.get("iscrowd", 0))
    labelled = int((keypoints[:, 2] > 0).sum())
    found.records.append(
        {
            "id": len(found.records) + 1,
            "image_id": picture.id,
            "category_id": PERSON,
            "bbox": list(box),
            "area": float(area),
            "iscrowd": int(crowd),
            "keypoints": keypoints,
            "num_keypoints": labelled,
        }
    )
    clipped = clip_box(box, picture.size)
    if crowd:
        found.skipped["crowd"] += 1
    elif labelled == 0:
        found.skipped["no keypoints"] += 1
    elif area <= 0:
        found.skipped["area 0"] += 1
    elif clipped is None:
        found.skipped["box outside the image"] += 1
    else:
        found.people.append(Person(picture, clipped, 1.0, keypoints))


def read_detections(file: Path, pictures: dict[int, Picture], of: Path) -> tuple[list[Person], Counter[str]]:
    """Read a detector's boxes: a JSON list of {"image_id", "category_id", "bbox", "score"}.

    Args:
        file: JSON.
        pictures: of the split, by image id.
        of: the file that lists these images, for the message.

    Returns:
        The boxes of persons with a part on the image, as they are (HRNet's code does not clip them), in the file's order;
        and how many others were skipped, by reason.

    Raises:
        DataError: the file is missing or malformed, or of other images.
    """
    content = _read_json(file)
    if not isinstance(content, list):
        raise DataError(f"{file}: must be a JSON list of boxes")
    people: list[Person] = []
    skipped: Counter[str] = Counter()
    foreign: Counter[int] = Counter()
    for place, entry in _entries(file, content, "", ("image_id", "category_id", "bbox", "score")):
        box, score, number = _box(place, entry), entry["score"], _integer(place, entry, "image_id")
        if not isinstance(score, int | float) or not np.isfinite(score):
            raise DataError(f"{place}: score must be a number, got {score!r}")
        if entry["category_id"] != PERSON:
            skipped["not a person"] += 1
        elif number not in pictures:
            foreign[number] += 1
        elif clip_box(box, pictures[number].size) is None:
            skipped["box outside the image"] += 1
        else:
            people.append(Person(pictures[number], box, float(score)))
    if foreign:
        raise DataError(
            f"{file}: {foreign.total()} of {len(content)} boxes are of images that {of} does not list, such as image_id "
            f"{next(iter(foreign))}: is this the detector file of another split?"
        )
    if not people:
        raise DataError(f"{file}: no box of a person in it")
    return people, skipped


def read_named_boxes(file: Path, pictures: Sequence[Picture]) -> list[Person]:
    """Read boxes for images of one's own: a JSON list of {"file_name", "bbox"} and, if known, "score".

    Raises:
        DataError: the file is missing or malformed, names an image that is not there, or has a box outside its image.
    """
    content = _read_json(file)
    if not isinstance(content, list) or not content:
        raise DataError(f"{file}: must be a JSON list of one box or more")
    by_name = {picture.file.name: picture for picture in pictures}
    people = []
    for place, entry in _entries(file, content, "", ("file_name", "bbox")):
        picture = by_name.get(str(entry["file_name"]))
        if picture is None:
            raise DataError(f"{place}: there is no image {entry['file_name']!r} in the folder")
        box, score = _box(place, entry), entry.get("score", 1.0)
        if clip_box(box, picture.size) is None:
            raise DataError(f"{place}: the box {list(box)} is outside the image of {picture.size} (height, width)")
        if not isinstance(score, int | float) or not np.isfinite(score):
            raise DataError(f"{place}: score must be a number, got {score!r}")
        people.append(Person(picture, box, float(score)))
    return people


def check_files(pictures: Sequence[Picture]) -> None:
    """Check that image files are there, without reading them.

    Raises:
        DataError: some are not; it names them.
    """
    missing = [str(picture.file) for picture in pictures if not picture.file.is_file()]
    if missing:
        raise DataError(*(f"{file}: no such image" for file in missing))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"{file}: not valid JSON: {error}") from error


def _entries(file: Path, entries: Any, key: str, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a list with a name for each; all must be objects with these keys."""
    if not isinstance(entries, list):
        raise DataError(f'{file}: "{key}" must be a list')
    for index, entry in enumerate(entries):
        place = f"{file}, {key}[{index}]" if key else f"{file}, entry {index}"
        if not isinstance(entry, dict):
            raise DataError(f"{place}: must be an object, got {entry!r}")
        if absent := [name for name in keys if name not in entry]:
            raise DataError(f"{place}: has no {', '.join(absent)}")
        yield place, entry


def _integer(place: str, entry: dict[str, Any], key: str) -> int:
    if not isinstance(entry[key], int):
        raise DataError(f"{place}: {key} must be an integer, got {entry[key]!r}")
    return entry[key]


def _numbers(place: str, entry: dict[str, Any], key: str, count: int) -> np.ndarray:
    try:
        numbers = np.array(entry[key], np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise DataError(f"{place}: {key} must be {count} finite numbers, got {entry[key]!r}")
    return numbers


def _box(place: str, entry: dict[str, Any]) -> Box:
    x, y, width, height = _numbers(place, entry, "bbox", 4).tolist()
    return x, y, width, height
