"""Runs of the toy task through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gsto_benchmarks import cli

HERE = Path(__file__).parent
CONFIG = """\
seed_everything: 3
trainer: {accelerator: cpu, devices: 1, max_epochs: 3, log_every_n_steps: 1}
model: {class_path: toy_task.ToyTask, init_args: {lr: 0.1}}
data: {class_path: toy_task.ToyData}
checkpoint_minutes: null
checkpoint_steps: 2
"""


@pytest.fixture
def toy(tmp_path):
    """Runs `gsto fit` on the toy task in a folder, in this process or in one of its own."""
    config = tmp_path / "toy.yaml"
    config.write_text(CONFIG)

    def fit(folder, *options, own_process=False):
        arguments = ["fit", "-c", str(config), f"--trainer.default_root_dir={tmp_path / folder}", *options]
        if not own_process:
            return cli.main(arguments)
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "gsto_benchmarks", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)

    return fit


@pytest.fixture
def trace(tmp_path):
    """The lines that a run wrote, a repeated step's last one counting."""

    def read(folder, rank=0):
        lines = [json.loads(line) for line in (tmp_path / folder / f"trace{rank}.jsonl").read_text().splitlines()]
        return {(line["step"], "loss" in line, tuple(line.get("names", ()))): line for line in lines}

    return read


@pytest.fixture
def checkpoint(tmp_path):
    def read(folder, name="last.ckpt"):
        return torch.load(tmp_path / folder / name, weights_only=True)

    return read


@pytest.fixture
def compare_runs():
    return assert_equal_runs


def differences(a, b, path="checkpoint"):
    """Where two checkpoints differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [line for key in a for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} items"]
        pairs = enumerate(zip(a, b, strict=True))
        return [line for index, (x, y) in pairs for line in differences(x, y, f"{path}[{index}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [f"{path}: tensors"]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]


def assert_equal_runs(one, other):
    # the folders' names, and the rehearsed end, differ by the test's making; current_score is what an evaluation left behind
    unlike = ("path", "models", "current_score")
    for run in (one, other):
        run["hyper_parameters"] = {k: v for k, v in run["hyper_parameters"].items() if k != "end_at"}
        for key, state in list(run["callbacks"].items()):
            run["callbacks"][key] = {k: v for k, v in state.items() if not any(word in k for word in unlike)}
    assert differences(one, other) == []
