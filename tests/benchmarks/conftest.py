"""Fixtures of the trainers' tests."""

from importlib.util import find_spec

import pytest
import torch

TRAINERS = find_spec("lightning") is not None
collect_ignore_glob = [] if TRAINERS else ["*"]


def pytest_report_header() -> str:
    return (
        "" if TRAINERS else "tests/benchmarks is left out: lightning is not installed (pip install 'gsto_ops[train]')"
    )


@pytest.fixture(autouse=True, scope="package")
def own_cache(tmp_path_factory):
    """What the trainers note in the user's cache folder stays out of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Images here are tiny: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
