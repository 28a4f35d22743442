import numpy as np
import pytest

from gsto_benchmarks.segmentation.scenes import CLASSES, IGNORE, PALETTE, make_scene


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(index, seed=7, size=(96, 192)) for index in range(30)]


def test_same_seed_and_index_give_the_same_scene(scenes):
    image, label = make_scene(5, seed=7, size=(96, 192))
    np.testing.assert_array_equal(image, scenes[5][0])
    np.testing.assert_array_equal(label, scenes[5][1])


@pytest.mark.parametrize(("index", "seed"), [(6, 7), (5, 8)])
def test_another_index_or_seed_gives_another_scene(scenes, index, seed):
    image, label = make_scene(index, seed=seed, size=(96, 192))
    assert (image != scenes[5][0]).mean() > 0.5
    assert (label != scenes[5][1]).mean() > 0.05


def test_shapes_and_label_values(scenes):
    assert len(PALETTE) == len(CLASSES) == len(set(CLASSES)) == len(set(PALETTE))
    for image, label in scenes:
        assert image.shape == (96, 192, 3) and image.dtype == np.uint8
        assert label.shape == (96, 192) and label.dtype == np.uint8
        assert set(np.unique(label)) <= {*range(len(CLASSES)), IGNORE}


def test_every_class_is_there_in_its_proportion(scenes):
    counts = np.bincount(np.concatenate([label.ravel() for _, label in scenes]), minlength=256)
    share = dict(zip(CLASSES, counts[: len(CLASSES)] / counts[: len(CLASSES)].sum(), strict=True))
    assert all(share[name] > 0.05 for name in ("sky", "building", "road", "vegetation"))
    assert 0.01 < share["car"] < 0.3
    assert all(0.001 < share[name] < 0.05 for name in ("person", "pole", "traffic light", "traffic sign"))
    assert 0 < counts[IGNORE] / counts.sum() < 0.1


def test_poles_are_thin(scenes):
    runs = []
    for _, label in scenes:
        pole = np.pad(label == CLASSES.index("pole"), ((0, 0), (1, 1))).astype(int)
        edges = np.diff(pole, axis=1)
        runs += (np.argwhere(edges == -1)[:, 1] - np.argwhere(edges == 1)[:, 1]).tolist()
    assert np.median(runs) <= 3


def test_colour_alone_does_not_solve_them(scenes):
    """The best table from colour (16 levels per channel) to class, fitted to half of the scenes, fails on the others."""
    quantized = [(image // 16).astype(int) @ [256, 16, 1] for image, _ in scenes]
    votes = np.zeros((4096, len(CLASSES)), int)
    for colors, (_, label) in zip(quantized[::2], scenes[::2], strict=True):
        valid = label != IGNORE
        np.add.at(votes, (colors[valid], label[valid]), 1)
    table, confusion = votes.argmax(1), np.zeros((len(CLASSES),) * 2, int)
    for colors, (_, label) in zip(quantized[1::2], scenes[1::2], strict=True):
        valid = label != IGNORE
        np.add.at(confusion, (label[valid], table[colors[valid]]), 1)
    hits = np.diag(confusion)
    assert (hits / (confusion.sum(0) + confusion.sum(1) - hits)).mean() < 0.35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": -1}, "index=-1"),
        ({"index": 0, "seed": -2}, "seed=-2"),
        ({"index": 0, "size": (16, 64)}, r"\(16, 64\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scene(**arguments)
