"""Fixtures of the pose tests."""

import json

import cv2
import numpy as np
import pytest

from gsto_benchmarks.pose.annotations import Person, Picture


@pytest.fixture
def coco_mini(data_root):
    return data_root / "coco_mini"


@pytest.fixture
def write_coco(tmp_path):
    """Writes images/val2017 and an annotation file of persons that stand in their boxes; `change` edits it before."""

    def write(people=2, change=lambda content: None, images=2):
        folder = tmp_path / "images" / "val2017"
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        content = {"images": [], "annotations": []}
        for number in range(images):
            name = f"{number:012}.jpg"
            cv2.imwrite(str(folder / name), rng.integers(0, 255, (96, 128, 3), np.uint8))
            content["images"].append({"id": 10 + number, "file_name": name, "height": 96, "width": 128})
        for number in range(people):
            points = np.column_stack([20 + 60 * rng.random((17, 2)), np.full(17, 2)]).round()
            content["annotations"].append(
                {
                    "id": number,
                    "image_id": 10 + number % images,
                    "category_id": 1,
                    "bbox": [10, 10, 80, 80],
                    "area": 3000.0,
                    "iscrowd": 0,
                    "keypoints": points.ravel().tolist(),
                    "num_keypoints": 17,
                }
            )
        change(content)
        file = tmp_path / "annotations" / "person_keypoints_val2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.fixture
def person(tmp_path):
    """Makes a person whose joints lie in a box."""

    def make(box=(10.0, 20.0, 40.0, 60.0), size=(200, 300), seed=0):
        points = np.array(box[:2]) + np.random.default_rng(seed).random((17, 2)) * np.array(box[2:])
        return Person(Picture(1, tmp_path / "none.jpg", size), box, 1.0, np.column_stack([points, np.full(17, 2.0)]))

    return make
