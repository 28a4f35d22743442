"""A representative part of the ahead-of-time compilation check of tests/triton_resources.py: no spills, shared memory fits."""

import importlib.util
import json
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
    kernels += (
        "update_running_statistics",
        "batch_norm_sum_backward",
        "batch_norm_sum_backward_terms",
        "gated_split",
        "gated_split_backward",
    )
    compiled = {(words[4], words[0]) for words in map(str.split, done.stdout.splitlines()) if len(words) > 4}
    for kernel in (f"{name}_kernel" for name in kernels):
        for architecture in ("80", "90"):
            assert (kernel, architecture) in compiled


def run_beside_the_scripts(code, *arguments):
    """What a program that imports the scripts in tests/ prints, in Triton without its interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


TWO_ARCHITECTURES = """
import torch, triton
from triton_resources import OfflineDriver, compiled
from triton_sweep import QUICK, launches
for architecture in (80, 90):
    triton.runtime.driver.set_active(OfflineDriver(architecture))
    kernel = next(each for each in launches(architecture, torch.bfloat16, QUICK) if each.name == "sum_rows_kernel")
    print(compiled(kernel, architecture).architecture)
"""


def test_one_process_compiles_for_each_architecture(tmp_path, monkeypatch):
    """Not for the first alone, whose kernels Triton keeps: ``compiled`` looks at what it has been given."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert run_beside_the_scripts(TWO_ARCHITECTURES).split() == ["80", "90"]


LAUNCHES = """
import json, sys
from dataclasses import replace
import torch
from triton_sweep import QUICK, WIDE, launches
few = {"channels": (64, 128, 384), "maps": ((8, 512, 1024), WIDE), "align_corners": (False, True), "activations": ("none",)}
domain = replace(QUICK, **few, transfers=(("bilinear", 1, 2), ("avg", 1, 2)), fusions=(), splits=(), losses=())
found = launches(90, getattr(torch, sys.argv[1]), domain)
print(json.dumps([[each.name, each.constants, each.args[4] is not None] for each in found]))
"""


@pytest.mark.parametrize("dtype, most_channels", [("float32", 128), ("bfloat16", 512)])
def test_tiles_that_spilled_are_not_chosen(dtype, most_channels):
    """Aligned taps of 8,192 elements; of float32 pooling with a product of over 128 channels, 64-bit offsets in full tiles."""
    found = json.loads(run_beside_the_scripts(LAUNCHES, dtype))

    def tiles(kernel, **flags):
        return [c for name, c, _ in found if name == f"{kernel}_kernel" and all(c[k] == v for k, v in flags.items())]

    pooled = [c for name, c, product in found if name == "gate_pool_kernel" and product]
    assert pooled and max(c["BLOCK_C"] for c in pooled) == most_channels
    aligned = [c["BLOCK_H"] * c["BLOCK_W"] * c["BLOCK_C"] for c in tiles("gate_backward", ALIGN=True)]
    assert max(aligned) == 4096
    assert {c["num_stages"] for c in tiles("pool", WIDE=True)} == {1 if dtype == "float32" else 3}
    assert {c["BLOCK_P"] for c in tiles("pyramid_logits", WIDE=True)} < {16, 32}
    if dtype == "float32":
        assert {c["BLOCK_N"] for c in pooled} == {16}
