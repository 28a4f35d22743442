import numpy as np
import pytest
import torch

from gsto_benchmarks.segmentation.transforms import IGNORE, EvalTransform, TrainTransform, pad, resize_long_side

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def paired_sample(height=60, width=90, cell=15):
    """Cells of one class each, painted in the grey 20 * class, so that the image can be read back as its own label."""
    rows, columns = np.mgrid[:height, :width] // cell
    label = ((rows * 7 + columns * 3) % 11).astype(np.uint8)
    return np.repeat(label[..., None] * 20, 3, axis=2), label


def read_back(image: torch.Tensor) -> np.ndarray:
    pixels = (image.numpy().transpose(1, 2, 0) * STD + MEAN) * 255
    return pixels.mean(2) / 20


def test_eval_normalises_with_imagenet_statistics():
    image, label = paired_sample()
    tensor, classes = EvalTransform()(image, label, np.random.default_rng(0))
    assert tensor.dtype == torch.float32 and classes.dtype == torch.int64
    expected = ((image / 255.0 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(classes.numpy(), label)


@pytest.mark.parametrize("seed", range(12))
def test_image_and_label_move_together(seed):
    image, label = paired_sample()
    transform = TrainTransform((64, 80), base_size=90, scale_steps=16)
    tensor, classes = transform(image, label, np.random.default_rng(seed))
    assert tensor.shape == (3, 64, 80) and classes.shape == (64, 80)
    classes, seen = classes.numpy(), read_back(tensor)
    valid = classes != IGNORE
    assert valid.any()
    inside = valid.copy()  # away from the borders between cells, where the interpolated image is mixed
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            inside &= np.roll(classes, step, axis) == classes
    inside[:2] = inside[-2:] = False
    inside[:, :2] = inside[:, -2:] = False
    assert inside.sum() > 200
    np.testing.assert_allclose(seen[inside], classes[inside], atol=0.02)
    # padding: 0 after normalisation, at the bottom and on one side
    assert (tensor.numpy()[:, ~valid] == 0).all()


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


def test_labels_are_never_interpolated():
    image, label = paired_sample()
    label[label == 5] = IGNORE
    _, resized = resize_long_side(image, label, 37)
    assert resized.shape == (25, 37)
    assert set(np.unique(resized)) <= set(np.unique(label))


def test_pad_is_at_the_bottom_and_on_the_right():
    pixels, label = np.ones((3, 4, 3), np.float32), np.ones((3, 4), np.uint8)
    padded, classes = pad(pixels, label, (5, 4))
    assert padded.shape == (5, 4, 3) and classes.shape == (5, 4)
    assert (padded[:3] == 1).all() and (padded[3:] == 0).all()
    assert (classes[:3] == 1).all() and (classes[3:] == IGNORE).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": (0, 8)}, r"crop_size.*\(0, 8\)"),
        ({"crop_size": (8, 8), "base_size": 0}, "base_size.*0"),
        ({"crop_size": (8, 8), "scale_steps": -1}, "scale_steps.*-1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainTransform(**arguments)
