"""The measured choices of a backend: what an entry decides and what it leaves alone, and the user's file of them."""

import json
import os
import subprocess
import sys

import pytest
import torch

import gsto_ops
from gsto_ops import backends, measured
from gsto_ops.tables import warn_once

X = torch.randn(1, 18, 16, 16)


@pytest.fixture(autouse=True)
def own_file(monkeypatch, tmp_path):
    """An empty table of this test's user, and no entries of this package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "SHIPPED", {})
    measured.TABLE.forget()
    measured.choices.cache_clear()
    warn_once.cache_clear()
    yield tmp_path / "gsto_ops" / "backends.json"
    measured.TABLE.forget()
    measured.choices.cache_clear()


needs_two = pytest.mark.skipif(
    "cpu" not in gsto_ops.available_backends(), reason="the C++ extension is not there: CPU tensors have one backend"
)


def remember(operator: str, input: torch.Tensor, backend: str) -> None:
    measured.remember(backends.call_of(operator, input), backend)


def test_without_entries_the_first_backend_that_can_runs():
    first = backends.select(X.device, X.dtype)
    assert backends.select_for("gated_scale_transfer", X) == first


@needs_two
def test_an_entry_decides_for_calls_like_its_own():
    remember("gated_scale_transfer", X, "reference")
    assert backends.select_for("gated_scale_transfer", X) == "reference"
    assert (
        backends.select_for("gated_scale_transfer", torch.randn(1, 18, 20, 20)) == "reference"
    )  # 4608 ... 8191 elements
    others = {
        "operator": ("gated_projection", X),
        "dtype": ("gated_scale_transfer", X.double()),
        "layout": ("gated_scale_transfer", X.to(memory_format=torch.channels_last)),
        "size": ("gated_scale_transfer", torch.randn(1, 18, 32, 32)),
    }
    for part, (operator, input) in others.items():
        assert backends.select_for(operator, input) == "cpu", part


@needs_two
def test_the_entry_is_followed_by_the_call(monkeypatch):
    ran = []
    original = gsto_ops.reference.gated_scale_transfer
    monkeypatch.setattr(gsto_ops.reference, "gated_scale_transfer", lambda *a: ran.append(a) or original(*a))
    rho = torch.randn(1, 18, 1, 1)
    expected = gsto_ops.gated_scale_transfer(X, rho, scale_factor=2)
    assert not ran
    remember("gated_scale_transfer", X, "reference")
    torch.testing.assert_close(gsto_ops.gated_scale_transfer(X, rho, scale_factor=2), expected)
    assert len(ran) == 1


@needs_two
def test_what_is_chosen_by_name_stays():
    remember("gated_scale_transfer", X, "reference")
    with gsto_ops.use_backend("cpu"):
        assert backends.select_for("gated_scale_transfer", X) == "cpu"


@needs_two
def test_compiled_code_does_not_depend_on_a_size():
    remember("gated_scale_transfer", X, "reference")
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, w: gsto_ops.gated_scale_transfer(x, w, scale_factor=2), backend=keep, fullgraph=True
    )
    compiled(X, torch.randn(1, 18, 1, 1))
    targets = [node.target for node in graphs[0].graph.nodes]
    assert torch.ops.gsto_ops.gated_scale_transfer.default in targets


@needs_two
def test_a_backend_that_cannot_run_here_is_not_taken():
    remember("gated_scale_transfer", X, "cuda")
    assert backends.select_for("gated_scale_transfer", X) == "cpu"


@needs_two
def test_entries_of_the_user_come_first(monkeypatch):
    key = backends.call_of("gated_scale_transfer", X).key
    monkeypatch.setattr(measured, "SHIPPED", {key: "reference"})
    assert backends.select_for("gated_scale_transfer", X) == "reference"
    remember("gated_scale_transfer", X, "cpu")
    measured.choices.cache_clear()  # another process
    assert backends.select_for("gated_scale_transfer", X) == "cpu"


@needs_two
def test_another_process_reads_what_was_written(own_file):
    remember("gated_scale_transfer", X, "reference")
    call = backends.call_of("gated_scale_transfer", X)
    assert json.loads(own_file.read_text()) == {call.key: "reference"}
    code = (
        "import torch\nfrom gsto_ops import backends\n"
        "print(backends.select_for('gated_scale_transfer', torch.randn(1, 18, 16, 16)))\nprint(backends.report())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.startswith("reference\n")
    assert f"1 in {own_file}" in done.stdout


@pytest.mark.parametrize("content", ["{ half of it", '{"key": "gpu"}', '["cpu"]'])
def test_a_damaged_file_is_ignored_with_a_warning(own_file, content):
    own_file.parent.mkdir()
    own_file.write_text(content)
    with pytest.warns(UserWarning, match="is ignored"):
        assert backends.select_for("gated_scale_transfer", X) == backends.select(X.device, X.dtype)


def test_unknown_backends_are_not_written():
    with pytest.raises(ValueError, match=r"backend must be one of \('cuda', .*got 'tpu'"):
        remember("gated_scale_transfer", X, "tpu")
