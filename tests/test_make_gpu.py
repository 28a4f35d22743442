"""``make gpu`` with a program in Python's place: what stops it; a part that fails does not cost the results of the others."""

import shutil
import subprocess
from pathlib import Path

import pytest

PARTS = [
    "pytest -q -m gpu -n 12",
    "gsto_benchmarks bench ops --quick",
    "gsto_benchmarks bench step",
    "gsto_benchmarks bench infer --batch 1 --size 1024x2048",
    "gsto_benchmarks bench summary",
]
SCRIPT = """#!/bin/sh
echo "$TORCH_CUDA_ARCH_LIST $*" >> "{log}"
case "$*" in
  *get_device_capability*) echo 9.0 ;;
esac
case "$*" in
  {fails}) exit 3 ;;
esac
"""


@pytest.fixture
def make_gpu(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not on the PATH")

    def run(*failing):
        log, python = tmp_path / "log", tmp_path / "python"
        python.write_text(SCRIPT.format(log=log, fails="|".join(f'*"{part}"*' for part in failing) or "nothing"))
        python.chmod(0o755)
        command = ["make", "-s", "gpu", f"GPU_PYTHON={python}"]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, log.read_text().splitlines()

    return run


def ran(calls):
    return [part for part in PARTS if any(call.endswith(f"-m {part}") for call in calls)]


def test_all_parts_run(make_gpu):
    status, output, calls = make_gpu()
    assert status == 0 and ran(calls) == PARTS and output.endswith("all parts passed\n")
    assert any(call.startswith("9.0 -m pip install") for call in calls)  # for the machine's own GPU alone


def test_parts_that_fail_are_named_after_all_others_have_run(make_gpu):
    status, output, calls = make_gpu(PARTS[0], PARTS[2])
    assert status != 0 and ran(calls) == PARTS
    assert output.endswith(f"failed:\n  {PARTS[0]}\n  {PARTS[2]}\n")


@pytest.mark.parametrize("early", ["torch.cuda.init", "pip install", "use_backend"])
def test_nothing_runs_without_a_gpu_or_a_build(make_gpu, early):
    status, _, calls = make_gpu(early)
    assert status != 0 and early in calls[-1] and not ran(calls)
