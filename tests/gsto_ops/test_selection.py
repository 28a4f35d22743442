"""What the sweeps leave out on a GPU."""

from itertools import product
from types import SimpleNamespace

import selection
import torch


def items(test, sizes, dtypes, **params):
    return [
        SimpleNamespace(
            nodeid=f"{test}[{size}-{dtype}]", callspec=SimpleNamespace(params={**params, "dtype": dtype, name: size})
        )
        for (name, size), dtype in product(sizes, dtypes)
    ]


def test_triton_runs_all_sizes_in_bfloat16_and_one_in_other_dtypes():
    sizes = [("shape", (1, 2)), ("shape", (3, 4)), ("shape", (5, 6))]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    found = selection.left_out(items("test_a", sizes, dtypes, backend="triton"))
    expected = {f"test_a[{size}-{dtype}]" for _, size in sizes[1:] for dtype in (torch.float32, torch.float16)}
    assert {item.nodeid for item in found} == expected


def test_each_test_has_its_own_first_size():
    given = [*items("test_a", [("case", 0)], [torch.float16], backend="triton")]
    given += items("test_b", [("case", 1), ("case", 2)], [torch.float16], backend="triton")
    assert [item.nodeid for item in selection.left_out(given)] == ["test_b[2-torch.float16]"]


def test_all_else_runs():
    sizes, dtypes = [("shape", 1), ("shape", 2)], [torch.float32, torch.float16]
    for backend in ("cuda", "cpu", "reference"):
        assert not selection.left_out(items("test_a", sizes, dtypes, backend=backend))
    assert not selection.left_out(items("test_a", [("size", 1), ("size", 2)], dtypes, backend="triton"))
    assert not selection.left_out([SimpleNamespace(nodeid="test_c")])
