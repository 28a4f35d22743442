"""gsto fit, validate, test, predict and verify on persons."""

import json

import cv2
import numpy as np
import pytest
import torch

from gsto_benchmarks import cli
from gsto_benchmarks.networks import load_network
from gsto_benchmarks.pose import PoseTask
from gsto_benchmarks.pose.codec import encode
from gsto_benchmarks.pose.keypoints import NAMES
from gsto_benchmarks.pose.loss import pose_loss
from gsto_benchmarks.pose.pictures import draw_skeleton

pytest.importorskip("pycocotools", reason="pycocotools is not installed")


def command(name, root, out, *more):
    options = [
        "-c",
        "coco_mini",
        f"--data.root={root}",
        f"--trainer.default_root_dir={out}",
        "--trainer.accelerator=cpu",
    ]
    return cli.main([name, *options, "--trainer.enable_progress_bar=false", "--data.input_size=[64,48]", *more])


@pytest.fixture(scope="module")
def run(data_root, tmp_path_factory):
    """A run of a few steps on coco_mini; its network finds nobody yet."""
    out = tmp_path_factory.mktemp("pose") / "run"
    options = [
        "--trainer.max_epochs=4",
        "--trainer.check_val_every_n_epoch=2",
        "--ema_decay=0.5",
        "--global_batch_size=12",
    ]
    assert command("fit", data_root / "coco_mini", out, *options, "--data.batch_size=6") == 0
    return out


def test_loss_is_half_the_mean_square_of_the_joints_that_count():
    rng = torch.Generator().manual_seed(0)
    outputs = [torch.randn(2, 17, 24, 18, generator=rng) for _ in range(3)]
    joints = torch.rand(2, 17, 3, generator=rng) * torch.tensor([72.0, 96.0, 1.0])
    joints[..., 2] = (joints[..., 2] > 0.3).float()
    joints[0, 0] = torch.tensor([-100.0, 20.0, 1.0])  # off the map
    total = 0.0
    targets, _ = encode(joints, (24, 18), 2)
    for weight, maps in zip((1.0, 0.5, 0.3), outputs, strict=True):
        by_joint = []
        for k in range(17):  # HRNet's words: a loss per joint, the mean of them
            counted = [bool(joints[n, k, 2]) and (n, k) != (0, 0) for n in range(2)]
            squares = [((maps[n, k] - targets[n, k]) ** 2).double() * counted[n] for n in range(2)]
            by_joint.append(0.5 * torch.stack(squares).mean())
        total += weight * torch.stack(by_joint).mean()
    assert pose_loss(outputs, joints, [1.0, 0.5, 0.3], 2).item() == pytest.approx(total.item(), rel=1e-5)
    with pytest.raises(ValueError, match="loss_weights must have a factor for each of the 3 outputs"):
        pose_loss(outputs, joints, [1.0], 2)


def test_a_training_run(run):
    files = {entry.name for entry in run.iterdir()}
    assert {"best.ckpt", "last.ckpt", "metrics.json", "metrics.csv", "curves.png", "overlays", "config.yaml"} <= files
    report = json.loads((run / "metrics.json").read_text())
    assert len(report["losses"]) == 8 and report["train_images"] == 12  # 4 steps of 2 accumulated batches
    assert np.mean(report["losses"][-2:]) < np.mean(report["losses"][:2])
    assert "val/AP_gt_flip" in report["final"] and 0 <= report["final"]["val/AR_gt_flip"] <= 1
    overlays = sorted((run / "overlays").iterdir())
    assert overlays[0].name == "000000000785.png" and len(overlays) == 4
    assert cv2.imread(str(overlays[0])).shape == (425, 2 * 640, 3)  # truth | poses


def test_one_person_is_learned_by_heart(data_root, tmp_path):
    root, one = data_root / "coco_mini", tmp_path / "one.json"
    content = json.loads((root / "test_coco.json").read_text())
    image = content["images"][0]["id"]
    persons = [entry for entry in content["annotations"] if entry["image_id"] == image]
    one.write_text(json.dumps({"images": content["images"][:1], "annotations": persons}))
    options = [f"--data.train.annotations={one}", f"--data.val.annotations={one}", "--data.boxes=ground_truth"]
    options += ["--data.input_size=[96,72]", "--data.batch_size=1", "--data.augmentation.scale=0"]
    options += ["--data.augmentation.flip=0", "--model.evaluation.flip=false", "--model.lr=4e-3"]
    lengths = ["--trainer.max_epochs=80", "--trainer.check_val_every_n_epoch=80"]
    assert command("fit", root, tmp_path / "run", *options, *lengths) == 0
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())["final"]
    # measured 0.8; the true heatmaps of this size give 0.9, wrong places 0
    assert figures["val/AP_gt"] > 0.5


def test_a_resumed_run_equals_an_uninterrupted_one(run, data_root, tmp_path):
    root, out = data_root / "coco_mini", tmp_path / "parts"
    options = [
        "--trainer.check_val_every_n_epoch=2",
        "--ema_decay=0.5",
        "--global_batch_size=12",
        "--data.batch_size=6",
    ]
    assert command("fit", root, out, *options, "--trainer.max_epochs=2") == 0
    assert command("fit", root, out, *options, "--trainer.max_epochs=4", "--resume") == 0
    one, other = (torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (run, out))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("options", "protocol", "boxes"),
    [
        ([], "det_flip", 118),
        (["--data.boxes=ground_truth", "--model.evaluation.decoding=dark"], "gt_flip_dark", 12),
        (["--data.boxes=ground_truth", "--model.evaluation.flip=false"], "gt", 12),
    ],
)
def test_validate(run, data_root, tmp_path, capsys, options, protocol, boxes):
    arguments = [f"--ckpt_path={run / 'best.ckpt'}", "--model.evaluation.overlays=1", *options]
    assert command("validate", data_root / "coco_mini", tmp_path, *arguments) == 0
    record = json.loads((tmp_path / "validate" / "metrics.json").read_text())
    assert f"AP_{protocol}" in record["figures"] and record["boxes"] == boxes and record["images"] == 4
    results = json.loads((tmp_path / "validate" / "keypoints.json").read_text())
    assert len(results) == record["poses"] > 0 and set(results[0]) == {"image_id", "category_id", "keypoints", "score"}
    assert len(list((tmp_path / "validate" / "overlays").iterdir())) == 1
    assert protocol in capsys.readouterr().out


def test_test_writes_the_servers_file(run, data_root, tmp_path, capsys):
    root = data_root / "coco_mini"
    infos = tmp_path / "image_info.json"
    infos.write_text(json.dumps({"images": json.loads((root / "test_coco.json").read_text())["images"]}))
    split = {"annotations": str(infos), "images": ".", "detections": "test_coco_det_AP_H_56.json"}
    options = [f"--ckpt_path={run / 'best.ckpt'}", *(f"--data.test.{key}={value}" for key, value in split.items())]
    assert command("test", root, tmp_path, *options) == 0
    results = json.loads((tmp_path / "test" / "keypoints.json").read_text())
    assert {entry["image_id"] for entry in results} <= {785, 40083, 196141, 197388} and len(
        results[0]["keypoints"]
    ) == 51
    assert not (tmp_path / "test" / "metrics.json").exists()


@pytest.mark.parametrize("given", [False, True])
def test_predict(run, data_root, tmp_path, given):
    root, options = (
        data_root / "coco_mini",
        [f"--ckpt_path={run / 'best.ckpt'}", f"--data.images={data_root / 'coco_mini'}"],
    )
    boxes = [{"file_name": "000000000785.jpg", "bbox": [280, 44, 218, 346], "score": 0.5}]
    if given:
        (tmp_path / "boxes.json").write_text(json.dumps(boxes))
        options.append(f"--data.image_boxes={tmp_path / 'boxes.json'}")
    assert command("predict", root, tmp_path, *options) == 0
    poses = json.loads((tmp_path / "predict" / "poses.json").read_text())
    assert len(poses) == (1 if given else 4) and set(poses[0]) == {"file_name", "bbox", "keypoints", "score"}
    assert poses[0]["bbox"] == ([280, 44, 218, 346] if given else [0, 0, 640, 425])
    assert {file.stem for file in (tmp_path / "predict" / "overlays").iterdir()} == {
        pose["file_name"].removesuffix(".jpg") for pose in poses
    }


def test_bad_data_stops_a_run_before_it_starts(data_root, tmp_path, capsys):
    root = data_root / "coco_mini"
    (tmp_path / "other.json").write_text('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 1}]')
    assert command("fit", root, tmp_path / "run", f"--data.val.detections={tmp_path / 'other.json'}") == 2
    error = capsys.readouterr().err
    assert "other.json: 1 of 1 boxes are of images that" in error and "Traceback" not in error
    assert not list((tmp_path / "run").glob("*.ckpt"))


def test_the_network_of_a_checkpoint(run):
    network = load_network(None, run / "best.ckpt")
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 48)).shape == (1, 17, 16, 12)


def test_two_processes_give_the_poses_of_one(run, data_root, tmp_path):
    root = data_root / "coco_mini"
    options = [f"--ckpt_path={run / 'best.ckpt'}", "--data.boxes=ground_truth"]
    assert command("validate", root, tmp_path / "one", *options) == 0
    both = ["--trainer.devices=2", "--trainer.strategy=ddp_spawn"]
    assert command("validate", root, tmp_path / "two", *options, *both) == 0
    one, two = (json.loads((tmp_path / name / "validate/keypoints.json").read_text()) for name in ("one", "two"))
    assert len(one) == len(two) > 0
    for mine, other in zip(one, two, strict=True):
        assert mine["image_id"] == other["image_id"]
        np.testing.assert_allclose(mine["keypoints"], other["keypoints"], atol=2e-3)


def test_verify(data_root, tmp_path, write_coco, capsys):
    mini = ["--splits", "val", "--annotations", "test_coco.json", "--images", "."]
    mini += ["--detections", "test_coco_det_AP_H_56.json"]
    root = data_root / "coco_mini"
    assert cli.main(["verify", "coco", "--root", str(root), *mini, "--any_count"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split()[:6] == ["val", "4", "5,000", "12", "118", "good"] and "left out: 2 no keypoints" in row
    assert cli.main(["verify", "coco", "--root", str(root), *mini]) == 1
    assert "not the published number" in capsys.readouterr().out
    wrong = write_coco(change=lambda content: content["images"][1].update(width=200))
    (wrong / "images/val2017/000000000000.jpg").write_bytes(b"broken")
    assert cli.main(["verify", "coco", "--root", str(wrong), "--any_count"]) == 1
    out = capsys.readouterr().out
    assert "000000000000.jpg: not an image that can be read" in out
    assert "000000000001.jpg: 96x128 instead of 96x200 (height x width)" in out
    assert "train: " in out and "person_keypoints_train2017.json: cannot be read" in out


def test_skeleton():
    image, points = np.zeros((60, 60, 3), np.uint8), np.tile([[30.0, 30.0]], (17, 1))
    shoulder, elbow = NAMES.index("left_shoulder"), NAMES.index("left_elbow")
    points[shoulder], points[elbow] = (10, 10), (50, 10)
    shown = np.zeros(17, bool)
    shown[[shoulder, elbow]] = True
    draw_skeleton(image, points, shown)
    np.testing.assert_allclose(image[10, 30], (66, 135, 245), atol=30)  # the left arm is blue, its edges smoothed
    assert not image[25:].any()  # the others are not drawn


def test_bad_task_options():
    with pytest.raises(ValueError, match="sigma must be > 0, got 0"):
        PoseTask(17, sigma=0, name="gsto_hrnet_w18_small_v2")
    with pytest.raises(ValueError, match="pspnet_r50 is for task 'segmentation' only"):
        PoseTask(17, name="pspnet_r50")
