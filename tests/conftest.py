"""Fixtures of all tests."""

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU is visible"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Small calls run faster on one thread, above all where other programs hold the cores. Tests may ask for more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with samples of the public data sets: GSTO_DATA_ROOT, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("GSTO_DATA_ROOT", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data samples: GSTO_DATA_ROOT is not set and {root} does not exist")
    return root
