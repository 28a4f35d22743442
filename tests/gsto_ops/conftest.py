"""Fixtures of the tests of compiled kernels."""

import importlib
from pathlib import Path

import emulated
import pytest
import selection
import torch


def pytest_collection_modifyitems(config, items):
    dropped = selection.left_out(items)
    config.hook.pytest_deselected(items=dropped)
    names = {item.nodeid for item in dropped}
    items[:] = [item for item in items if item.nodeid not in names]


class OnGpu:
    """torch.ops.gsto_ops for CPU tensors, by way of the GPU."""

    def __getattr__(self, name):
        if name == "set_allow_tf32":
            return lambda allow: setattr(torch.backends.cuda.matmul, "allow_tf32", allow)
        operator = getattr(torch.ops.gsto_ops, name)
        return lambda *operands: moved(operator(*moved(operands, "cuda")), "cpu")


def moved(value, device):
    """The tensors in ``value``, lists and tuples of them included, on this device."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


DEVICES = ["emulated", *([pytest.param("gpu", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="session")
def emulated_operators(request, tmp_path_factory):
    """The CUDA operators for CPU tensors by the emulator."""
    if emulated.compiler() is None:
        pytest.skip("no C++ compiler")
    cache = getattr(request.config, "cache", None)  # none under -p no:cacheprovider
    return emulated.load(Path(cache.mkdir("gsto_emulated")) if cache else tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session", params=DEVICES)
def cuda_operators(request):
    """The CUDA operators for CPU tensors: by the emulator, and on a GPU where there is one."""
    if request.param == "gpu":
        importlib.import_module("gsto_ops._CUDA")
        return OnGpu()
    return request.getfixturevalue("emulated_operators")


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "baseline"])
def instruction_set(request):
    """The kernels of each instruction set in turn."""
    extension = pytest.importorskip("gsto_ops._C", reason="the C++ extension is not there", exc_type=ImportError)
    info = extension.build_info()
    if request.param not in info["instruction_sets_here"]:
        pytest.skip(f"{request.param} is not among {info['instruction_sets_here']} on this machine")
    extension.use_instruction_set(request.param)
    yield request.param
    extension.use_instruction_set(info["instruction_set"])


@pytest.fixture
def fresh_memory_is_nan():
    """New memory is filled with NaN, so that an element that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty then fills its memory with NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
