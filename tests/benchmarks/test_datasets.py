import cv2
import numpy as np
import pytest
import torch

from gsto_benchmarks.sampling import Draw
from gsto_benchmarks.segmentation import CamVidData, DataError, ScenesData
from gsto_benchmarks.segmentation.transforms import IGNORE


@pytest.fixture
def camvid(tmp_path):
    """A folder in CamVid's layout: four training and two validation images of 40x64."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for folder in (split, f"{split}annot"):
            (tmp_path / folder).mkdir()
        for index in range(count):
            write(tmp_path / split / f"{index}.png", rng.integers(0, 256, (40, 64, 3)))
            write(tmp_path / f"{split}annot" / f"{index}.png", rng.integers(0, 12, (40, 64)))
    return tmp_path


def write(file, pixels):
    assert cv2.imwrite(str(file), np.asarray(pixels, np.uint8))


def setup(root, **options):
    data = CamVidData(str(root), crop_size=(32, 32), base_size=64, batch_size=2, num_workers=0, **options)
    data.setup("fit")
    return data


def test_void_becomes_ignored_and_channels_are_rgb(camvid):
    label = np.zeros((40, 64), np.uint8)
    label[0, :13] = [*range(12), 255]
    write(camvid / "valannot" / "0.png", label)
    blue = np.zeros((40, 64, 3), np.uint8)
    blue[..., 0] = 255  # OpenCV writes blue first
    write(camvid / "val" / "0.png", blue)
    image, classes, name = setup(camvid).val_set.read(0)
    assert classes[0, :13].tolist() == [*range(11), IGNORE, IGNORE]
    assert image[0, 0].tolist() == [0, 0, 255]
    assert name == "0.png"


def test_batches(camvid):
    data = setup(camvid)
    images, labels, names = next(iter(data.train_dataloader()))
    assert images.shape == (2, 32, 32, 3) and labels.shape == (2, 32, 32) and len(names) == 2
    assert len(data.train_dataloader()) == 2
    images, labels, _ = next(iter(data.val_dataloader()))
    assert images.shape == (1, 40, 64, 3) and labels.shape == (1, 40, 64)


def remove(path):
    def break_it(root):
        for file in (root / path).parent.glob((root / path).name):
            file.unlink()

    return break_it


def remove_folder(name):
    def break_it(root):
        (root / name).rename(root / "elsewhere")

    return break_it


def replace(path, pixels):
    return lambda root: write(root / path, pixels)


def label_with(value):
    label = np.zeros((40, 64))
    label[3, 4] = value
    return label


def add(path, content):
    return lambda root: (root / path).write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (remove_folder("train"), "train: no such folder"),
        (remove_folder("valannot"), "valannot: no such folder"),
        (remove("train/*.png"), "train: no images"),
        (remove("trainannot/2.png"), r"train.2\.png has no label: .*trainannot.2\.png is missing"),
        (remove("val/1.png"), r"valannot.1\.png has no image"),
        (replace("trainannot/1.png", np.zeros((40, 63))), r"train.1\.png and .*trainannot.1\.png .* 40x64 and 40x63"),
        (
            replace("trainannot/3.png", label_with(12)),
            r"trainannot.3\.png: label value 12 is out of range; allowed are 0 to 11, 255",
        ),
        (replace("valannot/0.png", label_with(200)), r"valannot.0\.png: label value 200 is out of range"),
        (replace("trainannot/0.png", np.zeros((40, 64, 3))), r"trainannot.0\.png: a label must have one 8-bit channel"),
        (add("train/0.png", b"not a picture"), r"train.0\.png: not an image"),
        (add("train/0.png", b""), r"train.0\.png: not an image"),
    ],
)
def test_bad_data_is_named_before_training(camvid, break_it, message):
    break_it(camvid)
    with pytest.raises(DataError, match=message):
        setup(camvid)


def test_batch_larger_than_the_set(camvid):
    data = CamVidData(str(camvid), batch_size=5)
    with pytest.raises(DataError, match=r"a step takes 5 images .* the training set has 4"):
        data.setup("fit")


def test_validation_does_not_need_the_training_folder(camvid):
    remove_folder("train")(camvid)
    data = CamVidData(str(camvid))
    data.setup("validate")
    assert len(data.val_set) == 2


def test_augmentation_is_a_function_of_the_draw(camvid):
    train = setup(camvid).train_set
    first, again, other = (train[Draw(1, seed)] for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    plain = train[1]
    assert plain[0].shape == (40, 64, 3) and plain[2] == first[2] == "1.png"


def test_batches_do_not_depend_on_the_number_of_workers(camvid):
    def batches(workers):
        data = CamVidData(str(camvid), crop_size=(32, 32), base_size=64, batch_size=2, num_workers=workers)
        data.setup("fit")
        return [images for images, _, _ in data.train_dataloader()]

    alone, together = batches(0), batches(2)
    assert len(alone) == 2 and all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_held_out_scenes_are_not_training_scenes():
    data = ScenesData(size=(32, 64), train_scenes=12, val_scenes=12, seed=3)
    data.setup("fit")
    train = {data.train_set.read(index)[0].tobytes() for index in range(12)}
    held_out = {data.val_set.read(index)[0].tobytes() for index in range(12)}
    assert len(train) == len(held_out) == 12 and not train & held_out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScenesData(train_scenes=0), "train_scenes must be >= 1, got 0"),
        (lambda: ScenesData(batch_size=0), "batch_size must be >= 1, got 0"),
        (lambda: CamVidData("x", num_workers=-1), "num_workers must be >= 0 or None, got -1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_real_camvid_files(data_root):
    data = CamVidData(str(data_root / "camvid_mini"), num_workers=0)
    data.setup("fit")
    assert len(data.train_set) == 40 and len(data.val_set) == 16
    image, label, _ = data.val_set[0]
    assert image.shape == (360, 480, 3) and label.shape == (360, 480)
    values = set(label.unique().tolist())
    assert values <= {*range(11), IGNORE} and len(values) > 6
