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
sys.path.insert(0, str(HERE))  # the runs import toy_task
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
