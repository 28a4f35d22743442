import io
import json
from contextlib import redirect_stdout

import cv2
import pytest
import torch

import gsto_models
from gsto_benchmarks import cli
from gsto_benchmarks.demo import GATES, DemoOptions, run_demo
from gsto_benchmarks.segmentation import ScenesData, SegmentationTask

FILES = {"checkpoint.ckpt", "metrics.json", "curves.png", "predictions.png", "gates.png"}
TINY = {"epochs": 2, "scenes": 4, "val_scenes": 3, "size": (32, 64), "batch_size": 4}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    (out / "notes.txt").write_text("mine")
    printed = io.StringIO()
    with redirect_stdout(printed):
        final = run_demo(DemoOptions(out=out, **TINY))
    return out, final, printed.getvalue()


def test_files(demo):
    out, final, _ = demo
    assert {file.name for file in out.iterdir()} == FILES | {"notes.txt"}
    assert (out / "notes.txt").read_text() == "mine"
    for name in FILES:
        if name.endswith(".png"):
            assert min(cv2.imread(str(out / name)).shape[:2]) > 50
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["final"] == final
    assert len(metrics["losses"]) == 2 and len(metrics["evaluations"]) == 2
    assert set(metrics["class_iou"]) == set(ScenesData.class_names)
    assert 0 <= final["val/mIoU_ss"] <= 1 and metrics["constant_prediction"]["mIoU"] > 0


def test_checkpoint_gives_the_evaluated_network_back(demo):
    out, final, _ = demo
    task = SegmentationTask.load_from_checkpoint(out / "checkpoint.ckpt", weights_only=True).eval()
    logged = {}
    task.log_dict = lambda figures, sync_dist: logged.update(figures)
    data = ScenesData(TINY["size"], TINY["scenes"], TINY["val_scenes"], 0, 4, 4)
    data.setup("validate")
    with torch.no_grad():
        for index, batch in enumerate(data.val_dataloader()):
            task.validation_step(data.on_after_batch_transfer(batch), index)
    task.on_validation_epoch_end()
    assert logged["val/pixel_acc_ss"] == pytest.approx(final["val/pixel_acc_ss"], abs=1e-3)


def test_gates_of_the_picture_exist_and_start_open(demo):
    network = gsto_models.create_model("gsto_hrnet_w18_small_v2", num_classes=10, gate_bias_init=4.0).eval()
    with torch.no_grad(), gsto_models.record_gates(network) as gates:
        network(torch.randn(1, 3, 64, 64))
    assert set(GATES) <= set(gates)
    assert all(gates[name].mean() > 0.9 for name in GATES)


def test_same_seed_same_result(demo, tmp_path):
    assert run_demo(DemoOptions(out=tmp_path, **TINY)) == demo[1]


def test_last_lines_name_the_files_and_the_next_command(demo):
    out, _, printed = demo
    lines = printed.strip().splitlines()[-6:]
    assert all(any(str(out / name) in line for line in lines) for name in FILES)
    assert lines[-1].startswith("Next: gsto ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be an integer >= 1, got '0'"),
        (["--scenes", "many"], "argument --scenes: must be an integer >= 1, got 'many'"),
        (["--seed", "-1"], "argument --seed"),
        (["--epoch", "1"], "unrecognized arguments: --epoch 1"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_too_few_scenes_for_a_batch(tmp_path, capsys):
    assert cli.main(["demo", "--scenes", "2", "--out", str(tmp_path)]) == 2
    assert "batch_size" in capsys.readouterr().err
