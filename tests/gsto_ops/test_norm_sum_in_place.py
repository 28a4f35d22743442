"""batch_norm_sum_ and norm_sum(inplace=True): the same numbers, written over a term where that is allowed and nowhere else."""

import copy

import pytest
import torch
from torch import nn

import gsto_ops

OPS = torch.ops.gsto_ops
NCHW, NHWC = torch.contiguous_format, torch.channels_last
LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=NHWC),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def norms_of(count, channels, dtype):
    """mean, var, weight, bias and eps."""
    wide = torch.promote_types(dtype, torch.float32)
    lists = ([torch.rand(channels, dtype=wide) + 0.1 for _ in range(count)] for _ in range(4))
    return *lists, [1e-5] * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first_layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize(
    "with_input, gated, sizes, written",
    [
        (False, False, [(6, 10)], 0),
        (True, False, [(6, 10)], 0),
        (True, True, [(3, 5), (6, 10), (6, 10)], 1),
        (False, False, [(6, 10), (2, 3)], 0),
    ],
)
def test_the_same_numbers_as_a_new_map(with_input, gated, sizes, written, first_layout, layout, dtype):
    torch.manual_seed(0)
    input = LAYOUTS[first_layout](torch.randn(2, 19, 6, 10).to(dtype)) if with_input else None
    gate = torch.rand(2, 1, 6, 10).to(dtype) if gated else None
    terms = [LAYOUTS[layout](torch.randn(2, 19, *size).to(dtype)) for size in sizes]
    norms = norms_of(len(terms), 19, dtype)
    kept = [None if x is None else x.clone() for x in (input, gate, *terms)]
    expected = OPS.batch_norm_sum(input, gate, terms, *norms, False, None, None, "relu", "bilinear", False)
    assert OPS.batch_norm_sum_(input, gate, terms, *norms, "relu", "bilinear", False) is None
    assert torch.equal(terms[written], expected)
    kept[2 + written] = expected
    for now, before in zip((input, gate, *terms), kept, strict=True):
        assert (now is None and before is None) or torch.equal(now, before)


def test_opcheck():
    x = torch.randn(2, 3, 4, 5)
    arguments = (x.clone(), None, [x[..., :2, :3].clone(), x.clone()], *norms_of(2, 3, torch.float32))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.batch_norm_sum_.default, (*arguments, "relu", "nearest", False), test_utils=tests)


def test_no_term_of_the_size_of_the_sum_is_an_error():
    if "cpu" not in gsto_ops.available_backends():
        pytest.skip("the C++ operators are not built: another kernel would answer")
    x = torch.randn(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="no term has the size of the sum, 4 x 5"):
        OPS.batch_norm_sum_(x, None, [x[..., :2].clone()], *norms_of(1, 3, torch.float32), "relu", "bilinear", False)


def written_over(norm, inplace=True, term=None, **options):
    """Whether norm_sum has changed its term."""
    term = torch.randn(2, 3, 4, 5) if term is None else term
    before = term.detach().clone()
    expected = gsto_ops.norm_sum(None, [before.clone()], [copy.deepcopy(norm)], activation="relu")
    result = gsto_ops.norm_sum(None, [term], [norm], activation="relu", inplace=inplace, **options)
    assert torch.equal(result, expected)
    assert torch.equal(term, before) or result is term
    return result is term


def test_a_term_is_written_over_in_inference_only():
    if "cpu" not in gsto_ops.available_backends():
        pytest.skip("the C++ operators are not built: nothing is written in place")
    norm = nn.BatchNorm2d(3)
    norm.running_mean.uniform_()
    with torch.no_grad():
        assert not written_over(norm.train())
        assert written_over(norm.eval())
        assert not written_over(norm, inplace=False)
        with gsto_ops.use_backend("reference"):
            assert not written_over(norm)
    with torch.inference_mode():
        assert written_over(norm)
    assert not written_over(norm)  # the norm's parameters want gradients
    assert not written_over(norm, term=torch.randn(2, 3, 4, 5, requires_grad=True))
    with torch.no_grad():
        terms = torch.randn(2, 2, 3, 4, 5)
        before = terms.clone()
        torch.func.vmap(lambda x: gsto_ops.norm_sum(None, [x], [norm], inplace=True))(terms)
        assert torch.equal(terms, before)
