import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_task import ToyData, ToyTask

from gsto_benchmarks import cli
from gsto_benchmarks.segmentation import SegmentationTask
from gsto_benchmarks.training.cli import count_processes
from gsto_benchmarks.training.plan import Memory, Plan, count_memory


class Layers(ToyTask):
    def __init__(self, **training):
        super().__init__(2, **training)
        self.use(nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2)))


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 1), ("adamw", 2)])
def test_memory_by_hand(optimizer, states):
    batch = (torch.zeros(7, 10), torch.zeros(7, dtype=torch.int64), ["x"] * 7)
    weights = 4 * (10 * 20 + 20 + 20 * 2 + 2)
    # float32 input, ReLU's output, log-softmax, the loss' sum of weights; int64 labels
    saved = 7 * 4 * (10 + 20 + 2) + 4 + 7 * 8
    memory = count_memory(Layers(optimizer=optimizer), batch, "32-true")
    assert memory == Memory(weights, weights, states * weights, saved)
    assert memory.total == (2 + states) * weights + saved


def test_memory_of_a_network_under_autocast():
    """What grows with the batch, against what a real step keeps on this machine."""
    task = SegmentationTask(5, "gsto_hrnet_w18_small_v2").train()
    batches = [(torch.randn(n, 3, 64, 64), torch.zeros(n, 64, 64, dtype=torch.int64), ["x"] * n) for n in (2, 3)]
    counted = [count_memory(task, batch, "bf16-mixed").activations for batch in batches]
    real = []
    for batch in batches:
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            task.training_loss(batch)
        real.append(sum(size for size, _ in kept.values()))
    assert counted[1] - counted[0] == pytest.approx(real[1] - real[0], rel=0.05)


def test_arithmetic():
    plan = Plan((2975, "counted"), (3, 2, 4), 10, 123, 10**11, (512, 1024), 5, Memory(1, 2, 3, 4))
    assert (plan.step_images, plan.steps) == (24, 1230)
    assert plan.seconds == pytest.approx(6 * 1e11 * 24 * 1230 / (4 * 72e12))


def test_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    cases = {("4", 1): 4, (2, 3): 6, ("0,2", 1): 2, ((0, 2), 2): 4, ("auto", 2): 6, (-1, 1): 3, ("-1", 1): 3}
    for (devices, nodes), expected in cases.items():
        devices = list(devices) if isinstance(devices, tuple) else devices
        assert count_processes(SimpleNamespace(devices=devices, num_nodes=nodes)) == expected


def test_dry_run(tmp_path, capsys):
    options = ["--trainer.devices=2", "--trainer.num_nodes=3", "--data.crop_size=[64,64]", f"--data.root={tmp_path}"]
    arguments = [*options, f"--trainer.default_root_dir={tmp_path / 'run'}", "--dry_run"]
    assert cli.main(["fit", "-c", "cityscapes_gsto_hrnet_w18_small_v2", *arguments]) == 0
    text = capsys.readouterr().out
    assert "2,975 (as published, since" in text and not (tmp_path / "run").exists()
    assert "12 per step = 2 at once x 1 accumulated x 6 GPUs" in text
    assert "600 epochs x 247 steps = 148,200 steps, 1,778,400 images" in text
    assert re.search(r"at least \d+\.\d GiB per GPU", text) and re.search(r"about \d+\.\d hours", text)


def test_dry_run_of_what_cannot_be_shared(capsys):
    assert cli.main(["fit", "-c", "cityscapes_gsto_hrnet_w48", "--trainer.devices=8", "--dry_run"]) == 2
    assert "global_batch_size 12 cannot be shared equally by 8 processes" in capsys.readouterr().err


def test_dry_run_of_a_split_that_does_not_exist(tmp_path, capsys):
    arguments = ["--data.root", str(tmp_path), "--data.train_split=train+vall", "--dry_run"]
    assert cli.main(["fit", "-c", "cityscapes_gsto_hrnet_w18_small_v2", *arguments]) == 2
    assert "has no split 'vall'; it has train, val" in capsys.readouterr().err


def test_dry_run_counts_what_is_there(toy, capsys):
    assert ToyData(train_size=26).count_train_images() == (26, "counted")
    assert toy("run", "--dry_run", "--trainer.max_epochs=2") == 0
    assert "2 epochs x 6 steps = 12 steps, 48 images" in capsys.readouterr().out
