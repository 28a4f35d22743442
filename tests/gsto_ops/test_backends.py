"""The choice of the backend, and what an install without the compiled extension does."""

import importlib.metadata
import os
import subprocess
import sys
import warnings

import pytest
import torch

import gsto_ops
from gsto_ops import backends


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


@pytest.fixture(autouse=True)
def nothing_found_yet(monkeypatch):
    """What a test finds on a machine that it makes up is not remembered."""

    class Forgetful(dict):
        def __setitem__(self, key, value):
            pass

    monkeypatch.setattr(backends, "_found", Forgetful())


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


class Installed:
    def __init__(self, version):
        self.version = version


@pytest.mark.parametrize(
    "package, version, reason",
    [
        ("triton", "3.1.0", "triton 3.1.0 is older than 3.4"),
        ("triton", "2.0.0.post1", "triton 2.0.0.post1 is older than 3.4"),
        ("triton", "3.4.0+git1234", None),
        ("triton", "3.10.0rc1", None),
        ("pytorch-triton-rocm", "3.5.1", None),
        ("triton", "unknown", "triton unknown is older than 3.4"),
        (None, None, "triton is not installed"),
    ],
)
def test_triton_versions(monkeypatch, package, version, reason):
    monkeypatch.setattr(
        importlib.metadata, "distributions", lambda name: [Installed(version)] if name == package else []
    )
    monkeypatch.setattr(backends, "_why_no_launcher", lambda: None)
    assert backends._find_triton() == reason


def test_triton_without_a_compiler_or_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [Installed("3.7.1")])
    monkeypatch.setattr(backends, "_INTERPRETED", False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backends._find_triton() == "triton needs a C compiler: neither gcc nor clang is on PATH, and CC is not set"
    compiler = tmp_path / "clang"
    compiler.touch(mode=0o755)
    monkeypatch.setattr(backends.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert "Python.h does not exist" in backends._find_triton()
    (tmp_path / "Python.h").touch()
    assert backends._find_triton() is None
    monkeypatch.setattr(backends, "_INTERPRETED", True)  # the interpreter compiles nothing
    (tmp_path / "Python.h").unlink()
    assert backends._find_triton() is None


MACHINES = {
    "old triton": ((9, 0), "triton 3.1.0 is older than 3.4", "triton: triton 3.1.0 is older than 3.4"),
    "no compiler": ((9, 0), "triton needs a C compiler", "triton: triton needs a C compiler"),
    "old GPU": ((7, 5), None, "triton: Made-up GPU is older than compute capability 8.0"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_a_gpu_that_the_kernels_cannot_use_is_reported_once(monkeypatch, machine):
    capability, no_triton, told = MACHINES[machine]
    monkeypatch.setattr(backends, "_found", {})
    monkeypatch.setattr(backends, "_no_triton", no_triton)
    monkeypatch.setattr(backends, "_no_cuda_extension", "gsto_ops._CUDA is not built (no nvcc)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Made-up GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    device = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match="cuda tensors run on the plain PyTorch reference") as caught:
        assert backends.select(device, torch.bfloat16) == "reference"
    assert "cuda: gsto_ops._CUDA is not built (no nvcc)" in str(caught[0].message) and told in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(device, torch.bfloat16) == "reference"
        assert backends.select(device, torch.float64) == "reference"  # by design, not by this machine
    assert told.removeprefix("triton: ") in backends.report()


def test_the_next_backend_is_used_without_a_word(monkeypatch):
    """Triton instead of the CUDA kernels is no loss that must be told; the report tells it."""
    monkeypatch.setattr(backends, "_found", {})
    monkeypatch.setattr(backends, "_no_triton", None)
    monkeypatch.setattr(backends, "_no_cuda_extension", "gsto_ops._CUDA is not built (no nvcc)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(torch.device("cuda", 0), torch.bfloat16) == "triton"


def test_a_cpu_without_the_extension_is_reported_once(monkeypatch):
    monkeypatch.setattr(backends, "_found", {})
    monkeypatch.setattr(backends, "_no_extension", "gsto_ops._C is not built (no compiler)")
    x, weight = torch.ones(1, 2, 3, 3), torch.ones(1, 2, 1, 1)
    with pytest.warns(UserWarning, match=r"cpu: gsto_ops._C is not built \(no compiler\)") as caught:
        for _ in range(3):
            gsto_ops.gated_scale_transfer(x, weight, size=2)
    assert len(caught) == 1
