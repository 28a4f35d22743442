"""The public data sets' layouts, made and real."""

import cv2
import numpy as np
import pytest
import torch
from made_data import make_camvid, make_cityscapes, make_lip, make_pascal_context, write

from gsto_benchmarks.images import decode_image
from gsto_benchmarks.sampling import Draw
from gsto_benchmarks.segmentation import (
    CamVidData,
    CityscapesData,
    DataError,
    LIPData,
    PascalContextData,
    ScenesData,
    cityscapes,
    verification,
)
from gsto_benchmarks.segmentation.datasets import describe_values
from gsto_benchmarks.segmentation.transforms import IGNORE

MAKERS = [
    (CityscapesData, make_cityscapes, {"crop_size": (32, 64), "base_size": 128}),
    (LIPData, make_lip, {}),
    (PascalContextData, make_pascal_context, {"crop_size": (48, 48), "base_size": 64}),
    (CamVidData, make_camvid, {"crop_size": (32, 32), "base_size": 64}),
]


def opened(data_class, root, stage="fit", **options):
    data = data_class(str(root), batch_size=2, num_workers=0, **options)
    data.setup(stage)
    return data


@pytest.mark.parametrize(("data_class", "make", "options"), MAKERS)
def test_batches_of_every_data_set(data_class, make, options, tmp_path):
    data = opened(data_class, make(tmp_path), **options)
    images, labels, names = data.on_after_batch_transfer(next(iter(data.train_dataloader())))
    crop = tuple(data.augment.crop_size)
    assert images.shape == (2, 3, *crop) and images.dtype == torch.float32 and len(names) == 2
    assert labels.shape == (2, *crop) and labels.dtype == torch.int64
    assert len(labels.unique()) > 3 and set(labels.unique().tolist()) <= {*range(data.num_classes), IGNORE}
    assert sum(len(names) for _, _, names in data.val_dataloader()) == len(data.val_set)
    _, label, _ = data.val_set.read(0)
    assert torch.equal(data.val_set[0][1], torch.from_numpy(label))
    assert len(data.class_names) == len(data.palette) == len(set(data.palette)) == data.num_classes
    stored = np.array(data.label_values)[np.where(label == IGNORE, 0, label)]
    assert (data.table[stored] == np.where(label == IGNORE, 0, label)).all()


def test_cityscapes_ids_become_classes(tmp_path):
    root = make_cityscapes(tmp_path)
    label = np.zeros((64, 128), np.uint8)
    label[0, :35] = [*range(34), 255]
    write(root / "gtFine/val/town/town_000000_000019_gtFine_labelIds.png", label)
    classes = opened(CityscapesData, root).val_set.read(0)[1]
    # the benchmark's own list, id -> trainId
    wanted = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    wanted |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    assert classes[0, :34].tolist() == [wanted.get(k, IGNORE) for k in range(34)]
    assert classes[0, 34] == IGNORE
    assert len(cityscapes.CLASS_WEIGHTS) == 19 and sum(cityscapes.CLASS_WEIGHTS) == pytest.approx(19, abs=0.01)


def test_cityscapes_train_and_val_together(tmp_path):
    root = make_cityscapes(tmp_path)
    assert len(opened(CityscapesData, root).train_set) == 3
    both = opened(CityscapesData, root, train_split="train+val").train_set
    assert len(both) == len({pair.image for pair in both.pairs}) == 5


def test_test_split_has_no_labels(tmp_path):
    data = opened(CityscapesData, make_cityscapes(tmp_path), "test")
    (batch,) = data.test_dataloader()
    assert (batch[1] == IGNORE).all() and batch[1].shape == (1, 64, 128)
    assert data.prediction_name(batch[2][0]) == "town_000000_000019_labelIds.png"


def test_lip_squashes_images_and_swaps_sides(tmp_path):
    data = opened(LIPData, make_lip(tmp_path), val_batch_size=3)
    ((images, labels, _),) = map(data.on_after_batch_transfer, data.val_dataloader())
    assert images.shape == (3, 3, 473, 473)
    assert all(label.dtype == torch.int64 for label in labels)
    assert [tuple(label.shape) for label in labels] == [(40, 48), (56, 48), (72, 48)]
    sides = {14: 15, 15: 14, 16: 17, 17: 16, 18: 19, 19: 18}
    assert data.augment.swap[:20].tolist() == [sides.get(k, k) for k in range(20)]


@pytest.mark.parametrize("folder", ["TrainVal_images", "TrainVal_images/TrainVal_images"])
def test_lip_as_the_archives_unpack(folder, tmp_path):
    make_lip(tmp_path / "flat")
    for kind, archive in (("images", folder), ("segmentations", folder.replace("images", "parsing_annotations"))):
        (tmp_path / archive).mkdir(parents=True)
        for split in ("train", "val"):
            (tmp_path / "flat" / f"{split}_{kind}").rename(tmp_path / archive / f"{split}_{kind}")
    assert len(opened(LIPData, tmp_path).train_set) == 3


def test_pascal_context_modes(tmp_path):
    root = make_pascal_context(tmp_path)
    label = np.arange(64, dtype=np.uint8)[None].repeat(64, 0).clip(max=59)[:, :48]
    write(root / "context_labels/val/2008_val0.png", label)
    full, without = (opened(PascalContextData, root, classes=n).val_set.read(0)[1] for n in (60, 59))
    assert full[0].tolist() == label[0].tolist()
    assert without[0].tolist() == [IGNORE, *range(47)]
    data = PascalContextData(str(root))
    assert data.num_classes == 59 and data.class_names[0] == "aeroplane" and data.class_names[-1] == "wood"
    with pytest.raises(ValueError, match="classes must be 59 or 60, got 61"):
        PascalContextData(str(root), classes=61)


def test_pascal_context_asks_for_prepare(tmp_path):
    with pytest.raises(DataError, match=r"context_labels.train: no such folder; `gsto prepare pascal_context`"):
        opened(PascalContextData, tmp_path)


def test_lists_say_what_belongs_to_a_split(tmp_path):
    root = make_camvid(tmp_path)
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.lst").write_text("train/1.png\ttrainannot/1.png\nval/0.png valannot/0.png\n\n")
    (lists / "val.lst").write_text("val/1.png valannot/1.png")
    data = opened(CamVidData, root, lists=str(lists))
    assert [pair.name for pair in data.train_set.pairs] == ["train/1.png", "val/0.png"]
    assert len(data.val_set) == 1
    (lists / "val.lst").write_text("val/1.png valannot/1.png more.png")
    with pytest.raises(DataError, match=r"val\.lst, line 1: must be an image and a label file"):
        opened(CamVidData, root, lists=str(lists))
    (lists / "val.lst").unlink()
    with pytest.raises(DataError, match=r"val\.lst: no such list"):
        opened(CamVidData, root, lists=str(lists))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda r: (r / "gtFine/train/town/town_000001_000019_gtFine_labelIds.png").unlink(),
            "_leftImg8bit.png has no label",
        ),
        (
            lambda r: (r / "leftImg8bit/val/town/town_000001_000019_leftImg8bit.png").unlink(),
            "_labelIds.png has no image",
        ),
        (lambda r: (r / "gtFine/train").rename(r / "gtFine/other"), "gtFine.train: no such folder"),
        (lambda r: (r / "leftImg8bit/train").rename(r / "other"), "leftImg8bit.train: no such folder"),
        (
            lambda r: write(
                r / "gtFine/train/town/town_000000_000019_gtFine_labelIds.png", np.full((64, 128), 34, np.uint8)
            ),
            "_labelIds.png: label value 34 is out of range; allowed are 0 to 33, 255",
        ),
    ],
)
def test_bad_cityscapes(break_it, message, tmp_path):
    root = make_cityscapes(tmp_path)
    break_it(root)
    with pytest.raises(DataError, match=message):
        opened(CityscapesData, root)


def test_wrong_split_name(tmp_path):
    with pytest.raises(DataError, match="CamVidData has no split 'vall'; it has train, val, test"):
        opened(CamVidData, make_camvid(tmp_path), val_split="vall")


def test_images_of_other_kinds_are_converted(tmp_path):
    grey = np.tile(np.arange(0, 160, 4, dtype=np.uint8), (30, 1))
    for suffix in (".png", ".jpg"):
        image = decode_image(write(tmp_path / f"grey{suffix}", grey))
        assert image.shape == (30, 40, 3)
        assert np.abs(image.astype(int) - grey[..., None]).max() <= 3
    alpha = np.zeros((8, 9, 4), np.uint8)
    alpha[..., 2] = 200
    assert decode_image(write(tmp_path / "alpha.png", alpha))[0, 0].tolist() == [200, 0, 0]


def test_cmyk_jpeg(tmp_path):
    pillow = pytest.importorskip("PIL.Image", reason="Pillow, which writes CMYK, is not installed")
    colors = np.zeros((16, 48, 3), np.uint8)
    colors[:, :16, 0], colors[:, 16:32, 1], colors[:, 32:, 2] = 255, 255, 255
    pillow.fromarray(colors).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    image = decode_image(tmp_path / "cmyk.jpg").astype(int)
    assert image.shape == colors.shape and np.abs(image - colors).mean() < 4


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_truncated_files_are_named(suffix, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    file = write(tmp_path / f"cut{suffix}", noise)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(DataError, match=rf"cut\{suffix}: not an image that can be read"):
        decode_image(file)


def test_several_problems_are_named_at_once(tmp_path):
    root = make_camvid(tmp_path)
    (root / "train/0.png").write_bytes(b"junk")
    write(root / "trainannot/2.png", np.full((40, 64), 77, np.uint8))
    with pytest.raises(DataError) as error:
        opened(CamVidData, root)
    first, second = str(error.value).splitlines()
    assert "0.png: not an image" in first and "2.png: label value 77" in second


def test_files_are_read_once_until_one_changes(tmp_path, monkeypatch):
    root, read = make_camvid(tmp_path), []

    def counting(dataset, title):
        read.append(title)
        return iter(())

    monkeypatch.setattr(verification, "find_problems", counting)
    for _ in range(2):
        opened(CamVidData, root)
    assert read == ["Checking train", "Checking val"]
    write(root / "valannot/1.png", np.full((40, 64), 3, np.uint8))
    opened(CamVidData, root)
    assert read == ["Checking train", "Checking val", "Checking val"]


def test_a_cache_that_cannot_be_written_only_warns(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written .*: the next run reads all files again"):
        opened(CamVidData, make_camvid(tmp_path / "data"))


def test_images_of_one_evaluation_batch_must_have_one_size(tmp_path):
    data = opened(PascalContextData, make_pascal_context(tmp_path), val_batch_size=2)
    with pytest.raises(DataError, match=r"one size, got 64x48 \(.*\) and 64x64 \(.*\): set val_batch_size to 1"):
        next(iter(data.val_dataloader()))


def test_data_without_a_test_set():
    with pytest.raises(DataError, match="ScenesData has no test set"):
        ScenesData(size=(32, 64), train_scenes=1, val_scenes=1).setup("test")


def test_runs_of_values():
    assert describe_values([0, 1, 2, 5, 255]) == "0 to 2, 5, 255"
    assert describe_values([7]) == "7"


def test_real_cityscapes_files(data_root):
    data = CityscapesData(str(data_root / "cityscapes_mini"), num_workers=0)
    data.setup("validate")
    image, label, name = data.val_set[0]
    assert image.shape == (128, 256, 3) and name == "frankfurt/frankfurt_000000_000294_leftImg8bit.png"
    folder = data_root / "cityscapes_mini/gtFine/val/frankfurt"
    own = cv2.imread(str(folder / "frankfurt_000000_000294_gtFine_labelTrainIds.png"), cv2.IMREAD_UNCHANGED)
    assert (label.numpy() != own).sum() == 77  # the two files were resized independently
    assert set(label.unique().tolist()) <= {*range(19), IGNORE}
    instances = data.instances().ids(name)
    assert instances.dtype == np.uint16 and instances.max() > 1000


def test_real_lip_files(data_root):
    data = LIPData(str(data_root / "lip_mini"), batch_size=1, num_workers=0)
    data.setup("fit")
    image, label, _ = data.val_set[0]
    assert image.shape == (473, 473, 3) and label.shape == (377, 130)
    grey = data.val_set.read(0)[0]
    assert (grey == grey[..., :1]).all()  # a grey JPEG
    image, label, _ = data.train_set[Draw(0, 3)]
    assert image.shape == (473, 473, 3) and label.shape == (473, 473) and len(label.unique()) > 3
