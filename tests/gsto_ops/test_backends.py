"""The choice of the backend, and what an install without the compiled extension does."""

import os
import subprocess
import sys

import pytest
import torch

import gsto_ops
from gsto_ops import backends


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_reference_is_always_there():
    assert gsto_ops.available_backends()[-1] == "reference"


def test_use_backend_as_function_and_context():
    assert backends._selected == "auto"
    with gsto_ops.use_backend("reference"):
        assert backends.select(torch.device("cpu"), torch.float32) == "reference"
        with gsto_ops.use_backend("auto"):
            pass
        assert backends._selected == "reference"
    gsto_ops.use_backend("reference")
    assert backends._selected == "reference"
    gsto_ops.use_backend("auto")


def test_unknown_and_unavailable_backends():
    with pytest.raises(ValueError, match=r"backend must be one of \('auto', .*got 'tpu'"):
        gsto_ops.use_backend("tpu")
    missing = [name for name in backends.BACKENDS if name not in gsto_ops.available_backends()]
    for name in missing:
        with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run here: "):
            gsto_ops.use_backend(name)
    assert backends._selected == "auto"


def test_cpu_backend_refuses_what_it_cannot_take():
    if "cpu" not in gsto_ops.available_backends():
        pytest.skip("the C++ extension is not built")
    with gsto_ops.use_backend("cpu"), pytest.raises(RuntimeError, match="not on 'meta'"):
        gsto_ops.gated_scale_transfer(
            torch.ones(1, 2, 3, 3, device="meta"), torch.ones(1, 2, 1, 1, device="meta"), scale_factor=2
        )


def test_environment_variable():
    code = "import gsto_ops.backends as b; print(b._selected)"
    assert run_python(code, GSTO_BACKEND="reference").stdout.strip() == "reference"
    failed = run_python(code, GSTO_BACKEND="tpu")
    assert failed.returncode != 0 and "GSTO_BACKEND must be one of" in failed.stderr


def test_report_names_every_backend():
    text = gsto_ops.backends.report()
    for name in backends.BACKENDS:
        assert name in text
    printed = subprocess.run([sys.executable, "-m", "gsto_ops"], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[1:] == text.splitlines()[1:]  # the first line has this process's number of threads


def test_without_the_extension_the_reference_runs_and_the_report_says_so():
    code = """
import sys, importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "gsto_ops._C":
            raise ModuleNotFoundError("hidden", name=name)
sys.meta_path.insert(0, Hide())
import torch, gsto_ops
assert gsto_ops.available_backends() == ["reference"]
x = torch.randn(1, 3, 4, 4, requires_grad=True)
gsto_ops.gated_scale_transfer(x, torch.randn(1, 3, 1, 1), scale_factor=2).sum().backward()
operator = torch.ops.gsto_ops.gated_scale_transfer
operator(x, torch.randn(1, 3, 1, 1), None, None, None, "none", [8, 8], "avg", False, None, None)[0].sum().backward()
print(gsto_ops.backends.report())
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "gsto_ops._C is not built" in result.stdout
    assert "CPU tensors run on: reference" in result.stdout


def test_an_extension_that_does_not_load_warns():
    code = """
import sys, importlib.abc
class Break(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "gsto_ops._C":
            raise ImportError("undefined symbol: made_up")
sys.meta_path.insert(0, Break())
import gsto_ops
assert gsto_ops.available_backends() == ["reference"]
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "does not load: undefined symbol: made_up" in result.stderr


def test_cuda_is_refused_with_its_reason(monkeypatch):
    """Each reason for which the CUDA kernels do not run, without a GPU: a call then takes the reference."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "_no_triton", "triton is not installed")
    monkeypatch.setattr(backends, "_no_cuda_extension", "gsto_ops._CUDA is not built (made up)")
    assert "made up" in backends.why_not("cuda")
    assert backends.select(gpu, torch.float32) == "reference"
    monkeypatch.setattr(backends, "_no_cuda_extension", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.why_not("cuda") == "no NVIDIA GPU is visible"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert backends.why_not("cuda") == "Old GPU is older than compute capability 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert backends.why_not("cuda") is None
    assert backends.select(gpu, torch.bfloat16) == "cuda"
    assert backends.select(gpu, torch.float64) == "reference"
    monkeypatch.setattr(backends, "_no_cuda_extension", "gsto_ops._CUDA is not built (made up)")
    monkeypatch.setattr(backends, "_no_triton", None)
    assert backends.select(gpu, torch.bfloat16) == "triton"
    monkeypatch.setattr(backends, "_no_cuda_extension", None)
    with gsto_ops.use_backend("cuda"), pytest.raises(RuntimeError, match=r"torch.float16, not torch\.float64"):
        backends.select(gpu, torch.float64)
