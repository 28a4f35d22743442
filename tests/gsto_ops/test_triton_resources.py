"""A representative part of the ahead-of-time compilation check of tests/triton_resources.py: no spills, shared memory fits."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_compile_ahead_of_time(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    script = Path(__file__).parents[1] / "triton_resources.py"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script), "--quick"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    kernels = ("project", "gate_pool", "gate_backward", "pool", "resample", "channel_statistics", "batch_norm_sum")
    kernels += ("batch_norm_sum_backward", "batch_norm_sum_backward_terms", "gated_split", "gated_split_backward")
    compiled = {(words[4], words[0]) for words in map(str.split, done.stdout.splitlines()) if len(words) > 4}
    for kernel in (f"{name}_kernel" for name in kernels):
        for architecture in ("80", "90"):
            assert (kernel, architecture) in compiled
