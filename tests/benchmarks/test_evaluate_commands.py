"""`gsto validate`, `gsto test` and `gsto predict` with their files."""

import json

import cv2
import lightning
import numpy as np
import pytest
import torch
import yaml
from made_data import make_camvid, make_cityscapes, make_lip, write

from gsto_benchmarks import cli
from gsto_benchmarks.segmentation import CityscapesData, LIPData, SegmentationTask
from gsto_benchmarks.segmentation.cityscapes import LABEL_IDS

CLASSES = {"CityscapesData": 19, "LIPData": 20, "CamVidData": 11}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Data module's name -> a checkpoint of a network with its number of classes, weights that tell colours apart."""
    folder, files = tmp_path_factory.mktemp("checkpoints"), {}
    for name, classes in CLASSES.items():
        torch.manual_seed(1)
        task = SegmentationTask(classes, name="hrnetv2_w18_small_v2")
        for parameter in task.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
        files[name] = folder / f"{name}.ckpt"
        torch.save({"state_dict": task.state_dict(), "pytorch-lightning_version": lightning.__version__}, files[name])
    return files


def command(name, data, root, checkpoint, out, *more):
    config = {
        "model": {
            "class_path": "gsto_benchmarks.segmentation.SegmentationTask",
            "init_args": {"name": "hrnetv2_w18_small_v2"},
        },
        "data": {
            "class_path": f"gsto_benchmarks.segmentation.{data}",
            "init_args": {"root": str(root), "num_workers": 0},
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "default_root_dir": str(out), "enable_progress_bar": False},
    }
    out.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return cli.main([name, "-c", str(file), f"--ckpt_path={checkpoint}", *more])


def load(checkpoint, classes):
    task = SegmentationTask(classes, name="hrnetv2_w18_small_v2")
    task.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    return task.eval()


def test_validate_cityscapes(checkpoints, tmp_path, capsys):
    root, out = make_cityscapes(tmp_path / "data", (("val", 1),)), tmp_path / "out"
    options = ["--model.evaluation.protocols=[ss,ms_flip]", "--model.evaluation.window=[64,128]"]
    options += ["--model.evaluation.window_above=1.0", "--model.evaluation.overlays=1"]
    assert command("validate", "CityscapesData", root, checkpoints["CityscapesData"], out, *options) == 0
    folder = out / "validate"
    names = {"metrics.json", "classes.md", "confusion_ss.png", "confusion_ms_flip.png", "overlays"}
    assert {file.name for file in folder.iterdir()} == names
    record = json.loads((folder / "metrics.json").read_text())
    kinds = ("mIoU_{}", "mIoU_{}_absent_as_zero", "pixel_acc_{}", "mean_acc_{}", "iIoU_{}")
    assert set(record["figures"]) == {kind.format(name) for kind in kinds for name in ("ss", "ms_flip")}
    assert set(record["classes"]) == set(CityscapesData.class_names)
    assert record["classes"]["road"]["iIoU_ss"] is None  # roads have no instances
    assert record["protocols"]["ms_flip"]["scales"] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75] and record["images"] == 1
    ious = [line["IoU_ss"] for line in record["classes"].values()]
    assert record["figures"]["mIoU_ss"] == pytest.approx(np.mean([iou for iou in ious if iou is not None]))
    printed = capsys.readouterr().out
    assert "val/mIoU_ms_flip" in printed and "motorcycle" in printed
    (overlay,) = (folder / "overlays").iterdir()
    assert cv2.imread(str(overlay)).shape == (64, 3 * 128, 3)
    assert cv2.imread(str(folder / "confusion_ss.png")).shape[0] > 300


def test_test_writes_what_the_server_takes(checkpoints, tmp_path, capsys):
    root, out = make_cityscapes(tmp_path / "data"), tmp_path / "out"
    assert command("test", "CityscapesData", root, checkpoints["CityscapesData"], out) == 0
    (file,) = (out / "test" / "labels").iterdir()
    assert file.name == "town_000000_000019_labelIds.png"
    label = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    data = CityscapesData(str(root), num_workers=0)
    data.setup("test")
    (batch,) = map(data.on_after_batch_transfer, data.test_dataloader())
    with torch.no_grad():
        (expected,) = load(checkpoints["CityscapesData"], 19).predict_labels(batch[0], [(64, 128)])
    assert label.dtype == np.uint8 and len(np.unique(label)) > 1
    np.testing.assert_array_equal(label, np.array(LABEL_IDS)[expected])
    assert "No labels: nothing to measure." in capsys.readouterr().out
    assert not (out / "test" / "metrics.json").exists()


def test_test_set_with_labels_is_measured(checkpoints, tmp_path, capsys):
    root, out = make_camvid(tmp_path / "data", (("test", 3),)), tmp_path / "out"
    assert command("test", "CamVidData", root, checkpoints["CamVidData"], out) == 0
    assert len(list((out / "test" / "labels").iterdir())) == 3
    assert "mIoU_ss" in json.loads((out / "test" / "metrics.json").read_text())["figures"]
    assert "test/mIoU_ss" in capsys.readouterr().out


def test_predict_a_folder_of_any_images(checkpoints, tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 52, 3)), ("b.jpg", (61, 33)), ("c.png", (64, 64, 4))):
        write(tmp_path / "images" / name, rng.integers(0, 256, shape).astype(np.uint8))
    options = [f"--data.images={tmp_path / 'images'}", f"--model.evaluation.out={tmp_path / 'mine'}"]
    assert command("predict", "LIPData", "nowhere", checkpoints["LIPData"], tmp_path / "out", *options) == 0
    for name, shape in (("a.png", (40, 52)), ("b.png", (61, 33)), ("c.png", (64, 64))):
        label = cv2.imread(str(tmp_path / "mine" / "labels" / name), cv2.IMREAD_UNCHANGED)
        assert label.shape == shape and label.max() < 20
        assert cv2.imread(str(tmp_path / "mine" / "overlays" / name)).shape == (shape[0], 2 * shape[1], 3)
    assert not (tmp_path / "out" / "predict").exists()


def test_lip_flip_protocol_on_batches_of_all_sizes(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(LIPData, "squash", (64, 64))  # 473 pixels take seconds
    root, out = make_lip(tmp_path / "data"), tmp_path / "out"
    options = ["--model.evaluation.protocols=[ss_flip,ss_squashed]"]
    assert command("validate", "LIPData", root, checkpoints["LIPData"], out, *options) == 0
    figures = json.loads((out / "validate" / "metrics.json").read_text())["figures"]
    data, task = LIPData(str(root), val_batch_size=1, num_workers=0), load(checkpoints["LIPData"], 20)
    data.setup("validate")
    correct = pixels = 0
    order = [*range(14), 15, 14, 17, 16, 19, 18]
    for images, labels, _ in map(data.on_after_batch_transfer, data.val_dataloader()):
        with torch.no_grad():
            logits = (task(images) + task(images.flip(3)).flip(3)[:, order]) / 2
        full = torch.nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear")
        correct += int((full.argmax(1) == labels).sum())
        pixels += labels.numel()
    assert figures["pixel_acc_ss_flip"] == pytest.approx(correct / pixels, abs=3 / pixels)
    assert "mIoU_ss_squashed" in figures


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("validate", ["--model.evaluation.protocols=[ms]"], "there is no 'ms' here; there are ss, ss_flip, ms_flip"),
        ("validate", ["--model.evaluation.stride=[9,9]"], "stride (9, 9) needs a window"),
        ("predict", [], "gsto predict needs --data.images FOLDER"),
        ("predict", ["--data.images=nowhere"], "nowhere: no such folder"),
        ("test", [], "test: no such folder"),
        ("validate", ["--data.val_split=vall"], "has no split 'vall'; it has train, val, test"),
    ],
)
def test_one_line_about_what_is_wrong(name, options, message, checkpoints, tmp_path, capsys):
    root, out = make_camvid(tmp_path / "data"), tmp_path / "out"
    assert command(name, "CamVidData", root, checkpoints["CamVidData"], out, *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named_from_a_loading_process_too(workers, checkpoints, tmp_path, capsys):
    write(tmp_path / "images" / "a.png", np.zeros((40, 40, 3), np.uint8))
    (tmp_path / "images" / "b.png").write_bytes(b"junk")
    options = [f"--data.images={tmp_path / 'images'}", f"--data.num_workers={workers}"]
    assert command("predict", "CamVidData", "x", checkpoints["CamVidData"], tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert f"gsto: {tmp_path / 'images' / 'b.png'}: not an image that can be read" in error
    assert "Traceback" not in error


def test_misspelt_evaluation_option(checkpoints, tmp_path, capsys):
    option = "--model.evaluation.flp=true"
    assert command("validate", "CamVidData", "x", checkpoints["CamVidData"], tmp_path / "o", option) == 2
    assert "flp" in capsys.readouterr().err
