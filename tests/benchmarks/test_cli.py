import json
import math
import re

import cv2
import numpy as np
import pytest
import torch
import yaml

from gsto_benchmarks import cli, configs
from gsto_benchmarks.segmentation import SegmentationTask

SMALL = [
    "--data.crop_size=[32,64]",
    "--data.base_size=64",
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.log_every_n_steps=1",
]


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    root = tmp_path_factory.mktemp("camvid")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for folder, shape, high in ((split, (40, 64, 3), 256), (f"{split}annot", (40, 64), 12)):
            (root / folder).mkdir()
            for index in range(count):
                assert cv2.imwrite(str(root / folder / f"{index}.png"), rng.integers(0, high, shape).astype(np.uint8))
    return root


def fit(root, out, *more):
    return cli.main(["fit", "-c", "camvid", f"--data.root={root}", f"--trainer.default_root_dir={out}", *SMALL, *more])


@pytest.fixture(scope="module")
def run(camvid, tmp_path_factory):
    """Two epochs of two steps."""
    out = tmp_path_factory.mktemp("run")
    assert fit(camvid, out, "--trainer.max_epochs=2") == 0
    return out


def test_run_folder(run):
    names = {file.name for file in run.iterdir()}
    wanted = {"best.ckpt", "last.ckpt", "metrics.csv", "metrics.json", "curves.png", "predictions.png", "config.yaml"}
    assert wanted <= names
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(metrics["losses"]) == 4 and all(math.isfinite(loss) for loss in metrics["losses"])
    assert [evaluation["step"] for evaluation in metrics["evaluations"]] == [2, 4]
    assert "val/mIoU_ss" in (run / "metrics.csv").read_text()


def test_learning_rate_decays_by_the_step_index(run):
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    step, rate = header.index("step"), header.index("train/lr")
    rates = {int(row[step]): float(row[rate]) for row in rows if row[rate]}
    config = yaml.safe_load((run / "config.yaml").read_text())
    lr = config["model"]["init_args"]["lr"]
    assert rates == pytest.approx({k: lr * (1 - k / 4) ** 0.9 for k in range(4)})


def test_resuming_with_another_length_and_rate(camvid, run, tmp_path):
    options = ["--trainer.max_epochs=3", "--model.lr=0.02", f"--ckpt_path={run / 'last.ckpt'}"]
    assert fit(camvid, tmp_path, *options) == 0
    header, row = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()][:2]
    values = dict(zip(header, row, strict=True))
    assert int(values["step"]) == 4
    assert float(values["train/lr"]) == pytest.approx(0.02 * (1 - 4 / 6) ** 0.9)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [evaluation["step"] for evaluation in metrics["evaluations"]] == [2, 4, 6]


def test_validate_repeats_the_figures_of_the_checkpoint(camvid, run, tmp_path, capsys):
    before = (run / "config.yaml").read_bytes()
    options = [f"--data.root={camvid}", "--trainer.accelerator=cpu", "--trainer.devices=1", "--data.num_workers=0"]
    options.append(f"--trainer.default_root_dir={tmp_path}")
    assert cli.main(["validate", "-c", "camvid", f"--ckpt_path={run / 'last.ckpt'}", *options]) == 0
    final = json.loads((run / "metrics.json").read_text())["final"]
    printed = [line for line in capsys.readouterr().out.splitlines() if "val/mIoU_ss " in line]
    assert float(printed[0].replace("│", " ").replace("|", " ").split()[-1]) == pytest.approx(
        final["val/mIoU_ss"], abs=1e-4
    )
    assert (run / "config.yaml").read_bytes() == before


def test_checkpoint_holds_the_options_of_the_network(run):
    task = SegmentationTask.load_from_checkpoint(run / "best.ckpt", weights_only=True)
    assert task.hparams.num_classes == 11 and task.hparams.gate_bias_init == 4.0


def test_loss_that_is_not_finite_stops_and_saves_the_batch(camvid, tmp_path, capsys):
    assert fit(camvid, tmp_path, "--trainer.max_epochs=2", "--model.lr=1e30") == 1
    error = capsys.readouterr().err
    assert re.search(r"the loss is (nan|inf) at step \d, batch \d of the epoch \(\d\.png, \d\.png\)", error)
    (file,) = tmp_path.glob("bad_batch_*.pt")
    assert str(file) in error and "Traceback" not in error
    saved = torch.load(file, weights_only=True)
    images, labels, names = saved["batch"]
    assert images.shape == (2, 3, 32, 64) and labels.shape == (2, 32, 64) and len(names) == 2
    assert not math.isfinite(saved["loss"])


@pytest.mark.parametrize("option", ["--model.lrr=0.1", "--trainer.max_epoch=3", "--data.init_args.rooot=x"])
def test_misspelt_key_is_an_error(option, capsys):
    assert cli.main(["fit", "-c", "camvid", option]) == 2
    assert option.split("=")[0].split(".")[-1] in capsys.readouterr().err


def test_misspelt_key_in_a_file_is_an_error(tmp_path, capsys):
    config = yaml.safe_load(configs.shipped_configs()["camvid"].read_text())
    config["model"]["init_args"]["gate_bais_init"] = 4.0
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config))
    assert cli.main(["fit", "-c", str(file)]) == 2
    assert "gate_bais_init" in capsys.readouterr().err


def test_print_config(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "-c", "camvid", "--model.lr=0.123", "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    model = config["model"]["init_args"]
    assert model["lr"] == 0.123 and model["name"] == "gsto_hrnet_w18_small_v2"


def test_config_names():
    file = str(configs.shipped_configs()["camvid"])
    expected = ["fit", "--config", file]
    assert configs.resolve_config_names(["fit", "-c", "camvid", "--x", "camvid"]) == [*expected, "--x", "camvid"]
    assert configs.resolve_config_names(["fit", "--config=camvid"]) == expected
    assert configs.resolve_config_names(["fit", "-c", file]) == expected
    child = str(configs.shipped_configs()["camvid_hrnetv2"])
    assert configs.resolve_config_names(["fit", "-c", "camvid_hrnetv2"]) == [*expected, "--config", child]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "-c", "camvit"], "-c camvit: neither a file nor a shipped configuration (shipped: camvid"),
        (["fit", "-c", "camvid", "--data.root=missing"], "missing/train: no such folder"),
        (["fit", "-c", "camvid", "--ckpt_path=missing.ckpt"], "missing.ckpt: no such file"),
        (["validate", "-c", "camvid"], "validate needs --ckpt_path"),
        (["fit"], "fit needs -c CONFIG: a file, or a shipped configuration"),
        (["fit", "-c", __file__], "test_cli.py: not a YAML file: "),
        (
            ["fit", "-c", "camvid", "--model.lrr=1"],
            "'gsto_benchmarks.segmentation.SegmentationTask': Option 'lrr' is not acc",
        ),
        (
            ["fit", "-c", "camvid", "--model.gate_form=x"],
            "Expected a typing.Literal['paper', 'released']; Given value: x",
        ),
        (
            ["fit", "-c", "camvid", "--trainer.max_epochs=x"],
            "trainer.max_epochs\": Expected a <class 'int'>; Given value: x",
        ),
        (["fit", "-c", "camvid", "--data.batch_size=0"], "gsto: batch_size must be >= 1, got 0"),
        (["fit", "-c", "camvid", "camvid_hrnetv2"], "unrecognized arguments: camvid_hrnetv2"),
        (["trian"], "no such command: 'trian'"),
        (["validat"], "did you mean 'validate'"),
    ],
)
def test_one_line_about_what_is_wrong(arguments, message, tmp_path, capsys):
    if arguments[0] == "fit":
        arguments = [*arguments, f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and "usage: gsto [options]" not in error


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert cli.main(["demo", "--out", str(file / "demo"), "--scenes", "2", "--epochs", "1"]) == 2
    assert capsys.readouterr().err.endswith(f"gsto: {file / 'demo'}: Not a directory\n")


def test_help_lists_the_commands(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ("demo", "fit", "validate", "info"))


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out
