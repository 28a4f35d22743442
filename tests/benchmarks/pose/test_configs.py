"""The shipped pose configurations: networks and recipes are the paper's."""

import re

import pytest
import torch
from shipped import reader

from gsto_benchmarks import cli, configs
from gsto_benchmarks.pose import Augmentation, PoseTask

NAMES = sorted(name for name, file in configs.shipped_configs().items() if "pose" in file.parts)
PAPER = [name for name in NAMES if name != "coco_mini"]


@pytest.fixture(scope="module")
def read():
    return reader()


def test_every_row_has_its_configurations():
    networks = ("gsto_hrnet_w32", "gsto_hrnet_w48", "hrnet_w32", "hrnet_w48")
    assert {f"coco_{name}{size}" for name in networks for size in ("", "_256x192")} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_recipe(read, name):
    config = read(name)
    assert config.trainer.default_root_dir == f"runs/{name}"
    assert config.model.class_path == "gsto_benchmarks.pose.PoseTask"
    assert config.data.class_path == "gsto_benchmarks.pose.CocoData"
    model, data, small = config.model.init_args, config.data.init_args, name.endswith("256x192")
    assert model.name == name.removeprefix("coco_").removesuffix("_256x192")
    assert (model.optimizer, model.lr, model.weight_decay) == ("adam", 1e-3, 0)
    assert (model.schedule, model.milestones, model.gamma) == ("multistep", [170, 200], 0.1)
    assert (config.trainer.max_epochs, config.global_batch_size) == (210, 80 if "w48" in name else 128)
    assert model.loss_weights == [1.0, 0.5, 0.3] and model.gate_bias_init is None and model.gate_form is None
    assert (tuple(data.input_size), model.sigma) == (((256, 192), 2) if small else ((384, 288), 3))
    augmentation = Augmentation(**vars(data.augmentation))
    assert augmentation == Augmentation("paper", rotation=45, scale=0.35, flip=0.5, half_body=0)
    assert data.boxes == "detector" and model.evaluation.flip and model.evaluation.decoding == "quarter"
    with torch.device("meta"):
        task = PoseTask(**{**{k: v for k, v in vars(model).items() if k != "evaluation"}, "num_classes": 17})
    head = configs.shipped_configs()[name].read_text()
    stated = re.search(r"([\d.]+)M parameters", head)
    assert bool(stated) != small
    if stated:
        assert sum(p.numel() for p in task.parameters()) / 1e6 == pytest.approx(float(stated[1]), abs=0.06)


def test_dry_run(read, capsys, tmp_path):
    assert cli.main(["fit", "-c", "coco_mini", "--data.root", str(tmp_path), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "149,813 (persons, as published" in out and "3,965,271 parameters" in out and "192x144" in out
