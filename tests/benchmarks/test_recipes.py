"""The shipped recipes train: on generated images in the public layouts the loss falls, and a run resumes bit for bit."""

import cv2
import numpy as np
import pytest
import torch
from made_data import make_camvid, make_cityscapes, make_lip, make_pascal_context

import gsto_models
from gsto_benchmarks import cli
from gsto_benchmarks.segmentation import CityscapesData, LIPData, PascalContextData, SegmentationTask

SMALL = [
    "--model.name=gsto_hrnet_w18_small_v2",
    "--global_batch_size=2",
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.precision=32-true",
    "--trainer.limit_val_batches=0",
    "--trainer.log_every_n_steps=1",
]


def keep_two_classes(data_class, root):
    """Few steps are enough for a network to learn that the other classes do not occur."""
    data = data_class(str(root))
    first, second = data.label_values[3:5]
    for pair in data.open_split("train").pairs:
        label = cv2.imread(str(pair.label), cv2.IMREAD_UNCHANGED)
        assert cv2.imwrite(str(pair.label), np.where(label % 3 == 0, first, second).astype(np.uint8))


@pytest.mark.parametrize(
    ("config", "data_class", "make", "sizes"),
    [
        ("cityscapes_gsto_hrnet_w48_ohem", CityscapesData, make_cityscapes, ["[64,64]", 128]),
        ("lip_gsto_hrnet_w48", LIPData, make_lip, ["[64,64]", 80]),
        ("pascal_context_gsto_hrnet_w48", PascalContextData, make_pascal_context, ["[64,64]", 64]),
    ],
)
def test_loss_falls(config, data_class, make, sizes, tmp_path):
    root = make(tmp_path / "data")
    keep_two_classes(data_class, root)
    run = tmp_path / "run"
    crop, base = sizes
    paths = [f"--data.root={root}", f"--data.crop_size={crop}", f"--data.base_size={base}"]
    length = ["--trainer.max_epochs=20", f"--trainer.default_root_dir={run}"]
    assert cli.main(["fit", "-c", config, *SMALL, *paths, *length]) == 0
    table = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    column = table[0].index("train/loss")
    losses = [float(row[column]) for row in table[1:]]
    assert len(losses) == 20 and np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4]), losses


class Crash(Exception):
    pass


def test_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch):
    """The whole trainer with GSTO-HRNet, BatchNorm, augmentation and an average of the weights."""
    root = make_camvid(tmp_path / "data")
    options = ["--data.crop_size=[32,64]", "--data.base_size=64", f"--data.root={root}", "--ema_decay=0.9"]
    options += ["--trainer.max_epochs=3", "--checkpoint_steps=1", "--data.batch_size=1", "--global_batch_size=1"]

    def fit(folder, *more):
        arguments = [f"--trainer.default_root_dir={tmp_path / folder}", *SMALL, *options, *more]
        return cli.main(["fit", "-c", "camvid", *arguments])

    assert fit("whole") == 0
    loss = SegmentationTask.training_loss

    def crash(self, batch):
        if self.global_step == steps // 2:
            raise Crash
        return loss(self, batch)

    steps = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["global_step"]
    monkeypatch.setattr(SegmentationTask, "training_loss", crash)
    with pytest.raises(Crash):
        fit("parts")
    monkeypatch.undo()
    assert fit("parts", "--resume") == 0
    whole, parts = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("whole", "parts"))
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(whole[key][name], tensor) for name, tensor in parts[key].items())
    momentum = [run["optimizer_states"][0]["state"] for run in (whole, parts)]
    assert all(torch.equal(momentum[0][k][name], momentum[1][k][name]) for k in momentum[0] for name in momentum[0][k])
    # a further run may start from these weights, which are the averages
    network = gsto_models.create_model("gsto_hrnet_w18_small_v2", pretrained=tmp_path / "whole" / "last.ckpt")
    assert all(
        torch.equal(whole["state_dict"][f"network.{name}"], value) for name, value in network.state_dict().items()
    )
