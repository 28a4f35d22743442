"""`gsto prepare` and `gsto verify`."""

import json
import re

import cv2
import numpy as np
import pytest
from made_data import blocks, make_camvid, make_cityscapes, make_lip, make_pascal_context, write

from gsto_benchmarks import cli
from gsto_benchmarks.segmentation import CamVidData, PascalContextData
from gsto_benchmarks.segmentation.pascal_context import CATEGORY_IDS

masks = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")


def make_detail(root, change=lambda content: None):
    """JPEGs and trainval_merged.json: masks in the order of painting, the later over the earlier; returns the labels."""
    rng = np.random.default_rng(0)
    content, labels = {"images": [], "annos_segmentation": []}, {}
    for number, phase in enumerate(["train", "train", "val"]):
        name = f"2008_00000{number}"
        image, label = blocks(rng, 40, 56, range(60))
        write(root / "VOCdevkit/VOC2010/JPEGImages" / f"{name}.jpg", image)
        content["images"].append(
            {"image_id": number, "file_name": f"{name}.jpg", "phase": phase, "height": 40, "width": 56}
        )
        for index in rng.permutation(np.unique(label)):
            if index == 0:
                continue
            region = (label == index) | (label == 0) & (rng.random(label.shape) < 0.1)
            label = np.where(region, index, label)
            rle = masks.encode(np.asfortranarray(region.astype(np.uint8)))
            rle["counts"] = rle["counts"].decode()
            content["annos_segmentation"].append(
                {
                    "id": 1000 * number + int(index),
                    "image_id": number,
                    "category_id": CATEGORY_IDS[index],
                    "segmentation": rle,
                }
            )
        labels[f"{phase}/{name}.png"] = label
    change(content)
    (root / "trainval_merged.json").write_text(json.dumps(content))
    return labels


def test_pascal_context_labels_are_the_annotations(tmp_path, capsys):
    labels = make_detail(tmp_path)
    assert cli.main(["prepare", "pascal_context", "--root", str(tmp_path), "--any_count"]) == 0
    for name, label in labels.items():
        made = cv2.imread(str(tmp_path / "context_labels" / name), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(made, label)
    data = PascalContextData(str(tmp_path), classes=60, num_workers=0, batch_size=1)
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (2, 1)
    assert str(tmp_path / "lists" / "val.lst") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annos_segmentation"][0].update(category_id=3), "has category 3, which is none of the 59"),
        (lambda c: c["images"][0].update(width=57), r"must have the image's size \(40, 57\), got \(40, 56\)"),
        (lambda c: c.pop("images"), "not the annotations of Pascal Context"),
    ],
)
def test_bad_annotations(change, message, tmp_path, capsys):
    make_detail(tmp_path, change)
    assert cli.main(["prepare", "pascal_context", "--root", str(tmp_path), "--any_count"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gsto: ") and "trainval_merged.json" in error
    assert re.search(message, error)


def test_missing_annotations(tmp_path, capsys):
    assert cli.main(["prepare", "pascal_context", "--root", str(tmp_path)]) == 2
    assert "trainval_merged.json: no such file" in capsys.readouterr().err


def test_lists_repeat_the_layout(tmp_path):
    root = make_camvid(tmp_path)
    assert cli.main(["prepare", "camvid", "--root", str(root), "--any_count", "--lists", str(tmp_path / "mine")]) == 0
    by_layout = CamVidData(str(root)).open_split("train+val").pairs
    by_list = CamVidData(str(root), lists=str(tmp_path / "mine")).open_split("train+val").pairs
    assert [pair[:2] for pair in by_layout] == [pair[:2] for pair in by_list]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cityscapes", make_cityscapes),
        ("lip", make_lip),
        ("pascal_context", make_pascal_context),
        ("camvid", make_camvid),
    ],
)
def test_verify_counts(name, make, tmp_path, capsys):
    root = make(tmp_path)
    assert cli.main(["verify", name, "--root", str(root), "--any_count"]) == 0
    assert cli.main(["verify", name, "--root", str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split(maxsplit=3) for line in reversed(lines) if line.startswith("train"))
    assert int(row[1]) == {"camvid": 4}.get(name, 3)
    assert int(row[2]) == {"cityscapes": 2975, "lip": 30462, "pascal_context": 4998, "camvid": 367}[name]
    assert row[3] == "not the published number"


def test_verify_names_every_problem(tmp_path, capsys):
    root = make_camvid(tmp_path, (("train", 6), ("val", 2)))
    (root / "train/0.png").write_bytes(b"junk")
    (root / "trainannot/1.png").unlink()
    write(root / "trainannot/2.png", np.full((40, 64), 77, np.uint8))
    write(root / "trainannot/3.png", np.zeros((40, 60), np.uint8))
    write(root / "trainannot/4.png", np.zeros((40, 64, 3), np.uint8))
    (root / "val/1.png").unlink()
    assert cli.main(["verify", "camvid", "--root", str(root), "--any_count"]) == 1
    printed = capsys.readouterr().out
    for text in (
        "train/0.png: not an image",
        "train/1.png has no label",
        "trainannot/2.png: label value 77 is out of range",
        "trainannot/3.png must have one size, got 40x64 and 40x60",
        "trainannot/4.png: a label must have one 8-bit channel",
        "valannot/1.png has no image",
    ):
        assert sum(text in line for line in printed.splitlines()) == 1
    assert "5 problems" in printed and "1 problem\n" in printed + "\n"


def test_verify_without_data(tmp_path, capsys):
    assert cli.main(["verify", "cityscapes", "--root", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "train: " in printed and "leftImg8bit/train: no such folder" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "citiscapes", "--root", "x"], "citiscapes"),
        (["verify", "lip", "--root", "x", "--splits", "vall"], "lip has no split 'vall'; it has train, val, test"),
        (["prepare", "lip", "--root", "x", "--annotations", "y"], "only pascal_context has annotations"),
        (["prepare", "lip"], "--root"),
    ],
)
def test_wrong_commands(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_real_files(data_root, capsys):
    for name in ("camvid", "lip"):
        assert cli.main(["verify", name, "--root", str(data_root / f"{name}_mini"), "--any_count"]) == 0
    root = str(data_root / "cityscapes_mini")
    assert cli.main(["verify", "cityscapes", "--root", root, "--splits", "val", "--any_count"]) == 0
