import cv2
import numpy as np
import pytest
import torch

from gsto_benchmarks.images import normalize
from gsto_benchmarks.segmentation.transforms import (
    IGNORE,
    PADDING,
    EvalTransform,
    TrainTransform,
    scaled_size,
)

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def paired_sample(height=60, width=90, cell=15):
    """Cells of one class each, painted in the grey 20 * class, so that the image can be read back as its own label."""
    rows, columns = np.mgrid[:height, :width] // cell
    label = ((rows * 7 + columns * 3) % 11).astype(np.uint8)
    return np.repeat(label[..., None] * 20, 3, axis=2), label


def test_normalize_has_imagenets_statistics():
    images = torch.randint(0, 256, (2, 6, 8, 3), dtype=torch.uint8)
    numbers = normalize(images)
    assert numbers.dtype == torch.float32 and numbers.is_contiguous(memory_format=torch.channels_last)
    expected = ((images.numpy() / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(numbers.numpy(), expected, atol=1e-6)
    padding = normalize(torch.tensor(PADDING, dtype=torch.uint8).view(1, 1, 1, 3))
    assert padding.abs().max() < 0.01


def test_eval_changes_nothing():
    image, label = paired_sample()
    pixels, classes = EvalTransform()(image, label)
    assert pixels.dtype == classes.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.numpy(), image)
    np.testing.assert_array_equal(classes.numpy(), label)


@pytest.mark.parametrize("seed", range(12))
def test_image_and_label_move_together(seed):
    image, label = paired_sample()
    transform = TrainTransform((64, 80), base_size=90, scale_steps=16)
    pixels, classes = transform(image, label, np.random.default_rng(seed))
    assert pixels.shape == (64, 80, 3) and classes.shape == (64, 80)
    classes, seen = classes.numpy(), pixels.numpy().mean(2) / 20
    valid = classes != IGNORE
    assert valid.any()
    inside = valid.copy()  # away from the borders between cells, where the interpolated image is mixed
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            inside &= np.roll(classes, step, axis) == classes
    inside[:2] = inside[-2:] = False
    inside[:, :2] = inside[:, -2:] = False
    assert inside.sum() > 200
    np.testing.assert_allclose(seen[inside], classes[inside], atol=0.03)
    assert (pixels.numpy()[~valid] == PADDING).all()  # at the bottom and on one side


def test_scale_and_flip_cover_their_ranges():
    image, label = paired_sample(40, 80)
    transform = TrainTransform((160, 200), base_size=80, scale_steps=10)
    lengths, flipped = [], 0
    for seed in range(200):
        _, classes = transform(image, label, np.random.default_rng(seed))
        valid = classes.numpy() != IGNORE
        lengths.append(int(valid.any(0).sum()))
        flipped += not valid[0, 0]
        assert int(valid.any(1).sum()) == pytest.approx(lengths[-1] / 2, abs=0.51)
    assert sorted(set(lengths)) == [40 + 8 * step for step in range(11)]
    assert 70 < flipped < 130


def test_crops_reach_all_places():
    label = np.arange(100, dtype=np.uint8).reshape(10, 10)
    image = np.repeat(label[..., None], 3, axis=2)
    transform = TrainTransform((4, 4), base_size=10, scale_steps=0, flip=False)
    transform.base_size = 20  # scale 0.5 of 20: the image's own size
    corners = {int(transform(image, label, np.random.default_rng(s))[1][0, 0]) for s in range(600)}
    assert corners == {10 * row + column for row in range(7) for column in range(7)}


def test_without_crop_only_the_flip_remains():
    image, label = paired_sample()
    transform = TrainTransform(None)
    seen = set()
    for seed in range(20):
        classes = transform(image, label, np.random.default_rng(seed))[1].numpy()
        straight, mirrored = (classes == label).all(), (classes == label[:, ::-1]).all()
        assert straight or mirrored
        seen.add(bool(mirrored))
    assert seen == {False, True}


@pytest.mark.parametrize("seed", range(6))
def test_one_warp_equals_resize_pad_crop_and_flip(seed):
    """Against the steps one by one, in float64 with OpenCV's own resizing: equal within the rounding to 8 bits."""
    noise = np.random.default_rng(9).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    image, label = cv2.GaussianBlur(noise, (0, 0), 1), noise[..., 0] % 7
    warped, classes = TrainTransform((60, 64), base_size=70, scale_steps=11)(image, label, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    scale = 0.5 + rng.integers(0, 11, endpoint=True) / 10
    width, height = int(70 * scale + 0.5), int(50 * scale + 0.5)
    pixels = cv2.resize(image.astype(np.float64), (width, height))
    rows, columns = ((np.arange(n) + 0.5) * (m / n) for n, m in ((height, 50), (width, 70)))
    nearest = label[rows.astype(int)][:, columns.astype(int)]
    bottom, right = max(0, 60 - height), max(0, 64 - width)
    padded = np.tile(np.array(PADDING, np.float64), (height + bottom, width + right, 1))
    padded[:height, :width] = pixels
    nearest = np.pad(nearest, ((0, bottom), (0, right)), constant_values=IGNORE)
    top, left = (rng.integers(0, n, endpoint=True) for n in (padded.shape[0] - 60, padded.shape[1] - 64))
    window = np.s_[top : top + 60, left : left + 64]
    step = -1 if rng.random() < 0.5 else 1
    np.testing.assert_array_equal(classes.numpy(), nearest[window][:, ::step])
    difference = np.abs(warped.numpy() - padded[window][:, ::step])
    assert difference.max() < 0.51 + 0.5  # rounding, and the 1/32 pixel grid of OpenCV 4's warps


def test_squash_gives_every_image_one_size():
    image, label = paired_sample(60, 30)
    transform = TrainTransform((40, 40), base_size=40, scale_steps=0, flip=False, squash=(40, 40))
    transform.base_size = 80  # scale 0.5 of 80: the squashed image itself
    pixels, classes = transform(image, label, np.random.default_rng(0))
    assert (classes != IGNORE).all()
    plain, kept = EvalTransform(squash=(40, 40))(image, label)
    assert plain.shape == (40, 40, 3) and kept.shape == (60, 30)
    assert (pixels.float() - plain.float()).abs().mean() < 1


def test_flip_swaps_the_pairs_of_labels_and_nothing_else():
    label = np.arange(6, dtype=np.uint8)[None].repeat(4, 0)
    label[0] = IGNORE
    image = np.zeros((4, 6, 3), np.uint8)
    seen = set()
    for seed in range(20):
        classes = TrainTransform(None, flip_pairs=[(1, 2), (4, 5)])(image, label, np.random.default_rng(seed))[1]
        assert (classes[0] == IGNORE).all()
        seen.add(tuple(classes[1].tolist()))
    assert seen == {(0, 1, 2, 3, 4, 5), (4, 5, 3, 1, 2, 0)}


def test_sizes_round_half_up():
    assert scaled_size((360, 480), 240) == (180, 240)
    assert scaled_size((3, 2), 5) == (5, 3)  # 3.33
    assert scaled_size((4, 2), 5) == (5, 3)  # 2.5
    assert scaled_size((500, 1), 10) == (10, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": (0, 8)}, r"crop_size.*\(0, 8\)"),
        ({"crop_size": (8, 8), "squash": (8, 0)}, r"squash.*\(8, 0\)"),
        ({"crop_size": (8, 8), "base_size": 0}, "base_size.*0"),
        ({"crop_size": (8, 8), "scale_steps": -1}, "scale_steps.*-1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainTransform(**arguments)
