"""Fixtures of the tests of compiled CPU kernels."""

import pytest
import torch


@pytest.fixture(params=["avx512", "avx2", "baseline"])
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
def one_thread():
    """Small calls run faster on one thread, above all where other programs hold the cores. Tests may ask for more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_memory_is_nan():
    """New memory is filled with NaN, so that an element that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty then fills its memory with NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
