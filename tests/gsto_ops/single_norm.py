"""Behind a single norm the gradient's passes find where the ReLU was open from the term: the same as from the output."""

import torch
from gated_kernels import layout

from gsto_ops import reference

SHAPES = [(2, 18, 9, 14), (3, 130, 4, 5), (1, 48, 8, 16), (2, 1, 5, 3), (2, 264, 3, 4), (2, 8, 33, 10), (0, 18, 4, 4)]


def compare_masks(ops, shape, dtype, channels_last, device="cpu"):
    """The passes of ``ops`` with the mask from the term, with that from forward's output, and the reference."""
    torch.manual_seed(0)
    new = {"device": device}
    wide = torch.promote_types(dtype, torch.float32)
    term = layout((torch.randn(shape, **new) + 0.3).to(dtype), channels_last)
    dy = layout(torch.randn(shape, **new).to(dtype), not channels_last)
    channels = shape[1]
    mean, weight, bias = (torch.randn(channels, dtype=wide, **new) for _ in range(3))
    mean, weight, bias = (
        0.3 + 0.1 * mean,
        weight + weight.sign(),
        0.1 * bias,
    )  # so that the ReLU is open for about one half
    var, eps = torch.rand(channels, dtype=wide, **new) + 0.5, 1e-3
    lists, statistics = [[mean], [var], [weight]], ([mean], [var], [eps])
    output = ops.batch_norm_sum(None, None, [term], *lists, [bias], [eps], True, None, None, "relu", "bilinear", False)
    assert shape[0] == 0 or 0.1 < (output > 0).double().mean() < 0.9

    masked, _, expected = ops.batch_norm_sum_backward(dy, output, [term], *statistics, "bilinear", False)
    operands = (dy, None, [term], *statistics, "bilinear", False, weight, bias)
    grad_sum, gathered, sums = ops.batch_norm_sum_backward(*operands)
    assert grad_sum.numel() == 0 and len(gathered) == 0
    close = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, float(expected.abs().max()))}
    torch.testing.assert_close(sums, expected, **close)
    doubles = ([mean.double()], [var.double()], [eps], "bilinear", False, weight.double(), bias.double())
    _, _, exact = reference.batch_norm_sum_backward(dy.double(), None, [term.double()], *doubles)
    torch.testing.assert_close(sums.double(), exact, **close)

    for total, counts in ((sums, None), (sums, torch.full((1,), 1000.0, dtype=wide, **new)), (None, None)):
        (expected,) = ops.batch_norm_sum_backward_terms(masked, [], [term], *lists, [eps], total, counts)
        (found,) = ops.batch_norm_sum_backward_terms(dy, [], [term], *lists, [eps], total, counts, bias)
        assert found.stride() == expected.stride() and found.dtype == dtype
        unit = 2 * torch.finfo(dtype).eps + 1e-6
        torch.testing.assert_close(found, expected, rtol=unit, atol=unit)
