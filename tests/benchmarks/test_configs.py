"""The shipped configurations: they can be read, their networks are the paper's, their recipes are the protocols'."""

import re

import pytest
import torch
from shipped import reader

from gsto_benchmarks import cli, configs
from gsto_benchmarks.segmentation import SegmentationTask

NAMES = sorted(name for name, file in configs.shipped_configs().items() if "segmentation" in file.parts)
# exact numbers of weights and biases in convolutions
CONV_PARAMS = {
    "cityscapes_hrnetv2_w18_small_v2": 3_923_091,
    "table1_gfm": 3_926_493,
    "table2_stage3": 3_945_097,
    "cityscapes_gsto_hrnet_w18_small_v2": 3_949_292,
    "cityscapes_hrnetv2_w48": 65_773_843,
    "cityscapes_gsto_hrnet_w48": 65_930_442,
}
# crop, base size, K, batch, learning rate, weight decay, epochs
RECIPES = {
    "cityscapes": ([512, 1024], 2048, 16, 12, 0.01, 5e-4, 600),
    "lip": ([473, 473], 473, 11, 40, 0.007, 5e-4, 150),
    "pascal": ([480, 480], 520, 16, 16, 0.004, 1e-4, 280),
}


@pytest.fixture(scope="module")
def read():
    return reader()


def head(name):
    return configs.shipped_configs()[name].read_text().split("\ntrainer:")[0]


@pytest.mark.parametrize("name", NAMES)
def test_config(read, name):
    config = read(name)
    assert config.trainer.default_root_dir == f"runs/{name}"
    assert config.model.class_path == "gsto_benchmarks.segmentation.SegmentationTask"
    num_classes = {"lip": 20, "camvid": 11, "pascal": 59}.get(name.split("_")[0], 19)
    num_classes = 60 if name.startswith("pascal_context60") else num_classes
    arguments = {key: value for key, value in vars(config.model.init_args).items() if key != "evaluation"}
    with torch.device("meta"):
        task = SegmentationTask(**{**arguments, "num_classes": num_classes})
    convolutions = [module for module in task.modules() if isinstance(module, torch.nn.Conv2d)]
    params = sum(parameter.numel() for conv in convolutions for parameter in conv.parameters())
    assert params == CONV_PARAMS.get(name, params)
    stated = re.search(r"([\d.]+)M parameters", head(name))
    if stated:
        assert params / 1e6 == pytest.approx(float(stated[1]), abs=0.0101)  # the paper rounds some up
    assert name.startswith("camvid") or "Paper" in head(name) or "baseline" in head(name) or "see there" in head(name)
    if "w48" not in name:  # which has the outputs of the small network, and takes seconds
        outputs = task.train()(torch.empty(2, 3, 64, 64, device="meta"))
        assert len(outputs) <= len(config.model.init_args.loss_weights)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("camvid")])
def test_recipe(read, name):
    config = read(name)
    crop, base_size, steps, batch, rate, decay, epochs = RECIPES.get(name.split("_")[0], RECIPES["cityscapes"])
    data, model = config.data.init_args, config.model.init_args
    assert (list(data.crop_size), data.base_size, data.scale_steps) == (crop, base_size, steps)
    assert (config.global_batch_size, data.batch_size, config.trainer.max_epochs) == (batch, batch, epochs)
    assert (model.lr, model.weight_decay) == (0.001 if name.endswith("trainval") else rate, decay)
    assert (model.optimizer, model.momentum, model.schedule, model.poly_power) == ("sgd", 0.9, "poly", 0.9)
    assert config.trainer.precision == "bf16-mixed" and model.class_weights is None
    assert list(model.loss_weights)[:2] == ([1.0, 0.4] if name.startswith("table6") else [1.0, 0.5])
    assert (model.ohem_threshold, model.ohem_min_kept) == (
        0.9 if "ohem" in name or "trainval" in name else None,
        131_072,
    )


def test_no_two_configs_are_the_same_run(read):
    runs = {}
    for name in NAMES:
        config = read(name)
        config.trainer.default_root_dir = config.config = None
        assert (same := runs.setdefault(str(config), name)) == name, f"{same} is {name}"


def test_own_settings_count_over_those_of_the_base(read):
    config = read("cityscapes_gsto_hrnet_w48_trainval", "--model.lr=0.5")
    assert config.model.init_args.lr == 0.5 and config.model.init_args.name == "gsto_hrnet_w48"
    assert config.data.init_args.train_split == "train+val" and config.data.init_args.val_split == "val"


def test_a_base_that_is_missing(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("# base: other.yaml\nseed_everything: 1\n")
    assert cli.main(["fit", "-c", str(tmp_path / "mine.yaml")]) == 2
    assert "its base" in (error := capsys.readouterr().err) and "other.yaml does not exist" in error
