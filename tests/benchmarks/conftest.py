"""Fixtures of the trainers' tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Images here are tiny: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
