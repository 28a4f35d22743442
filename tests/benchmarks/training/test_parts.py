import csv
import errno
import re

import pytest
import torch
from toy_task import ToySet, ToyTask

from gsto_benchmarks import cli
from gsto_benchmarks.errors import DataError, UsageError
from gsto_benchmarks.training.batches import share_batch
from gsto_benchmarks.training.optimization import make_optimizer, multistep_factor
from gsto_benchmarks.training.table import MetricsTable
from gsto_benchmarks.training.trouble import explain


@pytest.mark.parametrize(
    ("global_size", "largest", "processes", "expected"),
    [
        (12, 12, 1, (12, 1)),
        (12, 12, 4, (3, 1)),
        (12, 4, 1, (4, 3)),
        (12, 5, 1, (4, 3)),
        (16, 6, 2, (4, 2)),
        (7, 3, 1, (1, 7)),
    ],
)
def test_share_batch(global_size, largest, processes, expected):
    size, accumulate = share_batch(global_size, largest, processes)
    assert (size, accumulate) == expected and size * accumulate * processes == global_size


@pytest.mark.parametrize(("global_size", "processes"), [(12, 8), (2, 4), (0, 1)])
def test_batch_that_cannot_be_shared(global_size, processes):
    with pytest.raises(UsageError, match=f"global_batch_size {global_size} cannot be shared equally by {processes}"):
        share_batch(global_size, 4, processes)


def test_accumulated_batches_train_like_the_whole_batch(toy, checkpoint):
    options = ["--model.norm=false", "--model.dropout=0", "--trainer.max_epochs=2"]
    assert toy("whole", "--global_batch_size=4", *options) == 0
    assert toy("parts", "--global_batch_size=4", "--data.batch_size=1", *options) == 0
    whole, parts = checkpoint("whole"), checkpoint("parts")
    assert whole["global_step"] == parts["global_step"] == 12
    for name, tensor in whole["state_dict"].items():
        assert torch.allclose(parts["state_dict"][name], tensor, rtol=1e-4, atol=1e-6), name


def test_only_one_of_two_ways_to_accumulate(toy, capsys):
    assert toy("run", "--global_batch_size=8", "--trainer.accumulate_grad_batches=2") == 2
    assert "global_batch_size decides about trainer.accumulate_grad_batches" in capsys.readouterr().err


def test_average_of_the_weights(toy, checkpoint):
    """After one epoch of 6 steps, against the recurrence over the weights of runs that stop after 1, 2, ... 6 steps."""
    assert toy("run", "--ema_decay=0.7", "--trainer.max_epochs=1", "--model.schedule=multistep") == 0
    saved = checkpoint("run")
    average = None
    for steps in range(1, 7):
        folder = f"run{steps}"
        assert toy(folder, f"--trainer.max_steps={steps}", "--model.schedule=multistep") == 0
        weights = checkpoint(folder)["state_dict"]
        if average is None:
            average = {name: tensor.double() for name, tensor in weights.items()}  # it starts as a copy of the first
        else:
            average = {name: 0.7 * average[name] + 0.3 * weights[name].double() for name in weights}
    for name, tensor in saved["state_dict"].items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor.double(), average[name], rtol=1e-5, atol=1e-6), name
        assert torch.equal(saved["current_model_state"][name], weights[name]), name


def test_bad_decay(toy, capsys):
    assert toy("run", "--ema_decay=1.0") == 2
    assert "ema_decay must be between 0 and 1, got 1.0" in capsys.readouterr().err


def test_sgd_is_the_paper_s():
    """v = 0.9 v + g + wd * w; w = w - lr * v, for weights and biases alike."""
    torch.manual_seed(0)
    parameters = [torch.randn(5, 3, requires_grad=True), torch.randn(3, requires_grad=True)]
    optimizer = make_optimizer("sgd", parameters, 0.1, 0.9, 5e-4, fused=True)
    expected, velocity = [p.detach().double() for p in parameters], [0.0, 0.0]
    for _ in range(4):
        for k, parameter in enumerate(parameters):
            parameter.grad = torch.randn_like(parameter)
            velocity[k] = 0.9 * velocity[k] + parameter.grad.double() + 5e-4 * expected[k]
            expected[k] = expected[k] - 0.1 * velocity[k]
        optimizer.step()
    for parameter, value in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.double(), value, rtol=1e-6, atol=1e-7)
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["fused"]


def test_multistep_factor():
    assert [multistep_factor(epoch, [3, 5], 0.1) for epoch in range(7)] == pytest.approx(
        [1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_multistep_rates_of_a_run(toy, trace):
    assert toy("run", "--model.schedule=multistep", "--model.milestones=[1,2]", "--model.gamma=0.5") == 0
    rates = {line["epoch"]: line["lr"] for line in trace("run").values() if "lr" in line}
    assert rates == pytest.approx({0: 0.1, 1: 0.05, 2: 0.025})


def test_compiled_and_clipped_runs(toy, checkpoint):
    """Compilation changes no name in a checkpoint, and clipping changes the weights."""
    assert toy("plain", "--trainer.max_epochs=1") == 0
    assert toy("clipped", "--trainer.max_epochs=1", "--trainer.gradient_clip_val=0.01") == 0
    plain, clipped = checkpoint("plain")["state_dict"], checkpoint("clipped")["state_dict"]
    assert any(not torch.equal(plain[name], clipped[name]) for name in plain)
    task = ToyTask(2, compile=True)
    torch.manual_seed(0)
    task.network.eval()
    images = torch.randn(2, 3, 6, 6)
    expected = task(images)
    task.network.compile(backend="eager")  # as `setup` does, without a compiler
    assert torch.equal(task(images), expected)
    assert task.state_dict().keys() == plain.keys()


def test_table_keeps_the_rows_of_before(tmp_path):
    first = MetricsTable(tmp_path)
    for step in range(6):
        first.log_metrics({"train/loss": 10.0 - step}, step)
    first.log_metrics({"val/score": 0.5}, 3)
    first.finalize("killed")
    second = MetricsTable(tmp_path)
    assert (tmp_path / "metrics.csv").exists()
    second.log_metrics({"train/loss": 1.0, "train/lr": 0.1}, 4)
    second.finalize("success")
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[3] == {"step": "3", "train/loss": "7.0", "train/lr": "", "val/score": "0.5"}
    assert rows[4] == {"step": "4", "train/loss": "1.0", "train/lr": "0.1", "val/score": ""}


def test_interrupted_run_has_one_table(toy, tmp_path):
    assert toy("whole", "--trainer.max_epochs=2") == 0
    assert toy("parts", "--trainer.max_steps=7", "--model.schedule=multistep") == 0
    assert toy("parts", "--resume", "--trainer.max_epochs=2") == 0
    with open(tmp_path / "parts" / "metrics.csv", newline="") as file:
        steps = [row["step"] for row in csv.DictReader(file)]
    assert steps == [str(step) for step in range(12)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            r"batches of 12 images.*Lower data",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "too little main memory.*data.batch_size",
        ),
        (MemoryError(), "too little main memory for batches of 12 images"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "data.num_workers.*/dev/shm"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.csv"), "no space to write to.*--resume"),
    ],
)
def test_failures_of_the_machine_are_explained(error, words):
    message = explain(error, 12, "runs/x")
    assert re.search(words, message) and "\n" not in message and "runs/x" in message


def test_other_errors_stay(toy):
    assert explain(RuntimeError("size mismatch"), 12, "runs/x") is None
    assert explain(FileNotFoundError(errno.ENOENT, "no such file"), 12, "runs/x") is None


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_sample_is_named_in_one_line(toy, capsys, monkeypatch, workers):
    def broken(self, item):
        raise DataError("street.png: not an image that can be read")

    monkeypatch.setattr(ToySet, "__getitem__", broken)
    assert toy("run", f"--data.num_workers={workers}") == 2
    assert capsys.readouterr().err.endswith("gsto: street.png: not an image that can be read\n")


def test_too_little_memory_ends_with_one_line(toy, capsys, monkeypatch):
    def too_large(self, batch):
        return torch.empty(2**50)

    monkeypatch.setattr(ToyTask, "training_loss", too_large)
    assert toy("run") == 1
    error = capsys.readouterr().err
    assert "too little main memory for batches of 4 images" in error and "Traceback" not in error


def test_compare(toy, tmp_path, capsys):
    for name, rate in (("slow", 0.01), ("fast", 0.1)):
        assert toy(name, f"--model.lr={rate}") == 0
    runs = [str(tmp_path / name) for name in ("slow", "fast")]
    capsys.readouterr()
    assert cli.main(["compare", *runs, "--metric=val/score", f"--out={tmp_path / 'compare.png'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    with open(tmp_path / "fast" / "metrics.csv", newline="") as file:
        scores = [float(row["val/score"]) for row in csv.DictReader(file) if row["val/score"]]
    assert lines[3].startswith(f"| {runs[1]} | 18 |") and lines[3].endswith(f"| {scores[-1]:.3f} | {max(scores):.3f} |")
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    assert cli.main(["compare", *runs, f"--out={tmp_path / 'compare.png'}"]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert cli.main(["compare", *runs, "--metric=val/mIoU_ss"]) == 2
    assert "has no val/mIoU_ss; evaluations in it: val/score" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path)]) == 2
    assert "metrics.csv: no such file" in capsys.readouterr().err
