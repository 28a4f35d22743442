"""The Triton kernels of gated_split, batch_norm_sum and channel_statistics in Triton's interpreter, against float64.

The sweeps (sweep_*) run in a process of their own: see test_triton_kernels.py.
"""

import interpreted
import pytest
import single_norm
import torch
import torch.nn.functional as F
from carriers import compare_carriers
from gated_kernels import DTYPES, layout, layouts, parameter
from interpreted import TINY, assert_close
from opchecked import OPERATORS, check_operator

import gsto_ops
from gsto_ops import reference
from gsto_ops.ops import layout_of

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")
OPS = torch.ops.gsto_triton


def test_fusion_kernels_in_the_interpreter():
    interpreted.run_sweeps(__file__, at_least=80)


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    interpreted.prepare()


def wide(operand):
    """``operand``, or all tensors in it, in float64."""
    if isinstance(operand, (list, tuple)):
        return [wide(o) for o in operand]
    return operand.double() if isinstance(operand, torch.Tensor) else operand


def flat(results):
    return [t for r in results for t in (flat(r) if isinstance(r, (list, tuple)) else [r])]


def check(name, operator, function, operands, dtype, usual=0.05):
    """Results of the operator, within twice the error of ``function`` in the same dtype."""
    results = operator(*operands)
    results, plain, exact = (
        [r] if isinstance(r, torch.Tensor) else r for r in (results, function(*operands), function(*wide(operands)))
    )
    for i, (found, p, e) in enumerate(zip(*map(flat, (results, plain, exact)), strict=True)):
        if e.numel():
            assert_close(found, e, p, f"{name} {i}", TINY[dtype], usual)
    return results


# batch, channels, size, input ("" none, "input", "gated"), sizes of the terms, mode, align_corners, activation
SUMS = [
    (2, 18, (8, 8), "", [(8, 8)], "bilinear", False, "relu"),  # 128 pixels: 32 of them side by side in channels_last
    (2, 48, (6, 7), "input", [(6, 7)], "bilinear", False, "relu"),
    (1, 130, (5, 7), "input", [(5, 7), (5, 7)], "bilinear", False, "none"),
    (2, 16, (4, 6), "gated", [(2, 3), (2, 2), (1, 3)], "bilinear", False, "relu"),
    (1, 36, (5, 6), "gated", [(5, 6), (3, 2)], "bilinear", True, "relu"),
    (3, 20, (4, 6), "gated", [(2, 3), (4, 6), (4, 6)], "nearest", False, "relu"),
    (2, 1, (4, 4), "input", [(4, 4), (2, 2)], "nearest", False, "none"),
    (2, 72, (3, 5), "", [(3, 5), (2, 5), (3, 4), (1, 1)], "bilinear", False, "relu"),
    (3, 64, (1, 1), "gated", [(1, 1)], "bilinear", False, "relu"),
]
IN_EVERY_DTYPE = [SUMS[i] for i in (0, 3, 4)]
CASES = [(case, torch.float32) for case in SUMS] + [(case, d) for case in IN_EVERY_DTYPE for d in DTYPES[1:]]


def make(case, dtype, last):
    """input, gate, terms, and means, variances, weights, biases of the terms."""
    batch, channels, size, given, sizes, *_ = case
    x = layout(parameter(batch, channels, *size, dtype=dtype), last) if given else None
    gate = torch.rand(batch, 3, *size).to(dtype)[:, 1:2] if given == "gated" else None
    terms = [layout(parameter(batch, channels, *s, dtype=dtype) + 0.5, last) for s in sizes]
    mean = [t.float().mean((0, 2, 3)) for t in terms]
    var = [t.float().var((0, 2, 3), correction=0) + 0.1 for t in terms]
    weight, bias = ([torch.randn(channels) for _ in terms] for _ in range(2))
    return x, gate, terms, [mean, var, weight, bias], [1e-5, 1e-3, 1e-4, 1e-5][: len(terms)]


@layouts
@pytest.mark.parametrize("case, dtype", CASES, ids=str)
def sweep_batch_norm_sum(case, dtype, last):
    *_, mode, align_corners, activation = case
    x, gate, terms, norms, eps = make(case, dtype, last)
    rest = (activation, mode, align_corners)

    def forward(*operands):
        return OPS.batch_norm_sum(*operands, False, None, None, *rest)

    def plain(*operands):
        return reference.batch_norm_sum(*operands, *rest)

    (output,) = check("output", forward, plain, (x, gate, terms, *norms, eps), dtype)
    first = terms[0] if x is None else x
    assert output.dtype == dtype and output.stride() == first.stride()
    if dtype == torch.float32:
        check("without norms", forward, plain, (x, gate, terms, [], [], [], [], []), dtype)

    mask = output if activation == "relu" else None
    mean, var, weight, _ = norms
    statistics = (mean, var, eps)
    dy = layout(parameter(*first.shape, dtype=dtype), not last)  # of another layout than the output
    operands = (dy, mask, terms, *statistics, mode, align_corners)
    pixels = first.numel() // first.shape[1]
    dm, gathered, sums = check(
        "first pass", OPS.batch_norm_sum_backward, reference.batch_norm_sum_backward, operands, dtype, pixels**0.5
    )
    if dtype == torch.float32:
        operands = (dy, mask, terms, [], [], [], mode, align_corners)
        function = reference.batch_norm_sum_backward
        check("without norms", OPS.batch_norm_sum_backward, function, operands, dtype, pixels**0.5)
    assert mask is None or dm.stride() == output.stride()
    assert [g.stride() for g in gathered] == [t.stride() for t in terms if t.shape != first.shape]
    dm = dy if mask is None else dm
    counts = torch.tensor([3.0 * t.numel() / t.shape[1] for t in terms])
    for total, pixels in ((sums, None), (sums, counts), (None, None)):
        operands = (dm, gathered, terms, mean, var, weight, eps, total, pixels)
        grads = check(
            "second pass",
            OPS.batch_norm_sum_backward_terms,
            reference.batch_norm_sum_backward_terms,
            operands,
            dtype,
        )
        assert [g.stride() for g in grads] == [t.stride() for t in terms]


@layouts
@pytest.mark.parametrize(
    "shape, dtype", [(s, torch.float32) for s in single_norm.SHAPES[:-1]] + [((2, 18, 9, 14), d) for d in DTYPES[1:]]
)
def sweep_mask_of_a_single_norm(shape, dtype, last):
    single_norm.compare_masks(OPS, shape, dtype, last)


@layouts
@pytest.mark.parametrize("case", SUMS, ids=str)
def sweep_gradients_of_batch_norm_sum(case, last):
    """In training, all the way through autograd, against autograd of F.batch_norm and F.interpolate."""
    *_, size, given, sizes, mode, align_corners, activation = case
    x, gate, terms, (_, _, weight, bias), eps = make(case, torch.float32, last)
    leaves = [t for t in (x, gate, *terms, *weight, *bias) if t is not None]

    def run(function, dtype):
        found = [t.detach().to(dtype).requires_grad_() for t in leaves]
        rest = iter(found)
        x, gate = (next(rest) if wanted else None for wanted in (given != "", given == "gated"))
        terms, weight, bias = ([next(rest) for _ in sizes] for _ in range(3))
        output = function(x, gate, terms, weight, bias)
        torch.manual_seed(1)
        dy = torch.randn(output.shape)
        return torch.autograd.grad(output, found, dy.to(dtype))

    def ours(x, gate, terms, weight, bias):
        mean, var = zip(*(OPS.channel_statistics(t.detach()) for t in terms), strict=True)
        norms = (list(mean), list(var), weight, bias, eps, True, None, None)
        return OPS.batch_norm_sum(x, gate, terms, *norms, activation, mode, align_corners)

    def plain(x, gate, terms, weight, bias):
        total = 0 if x is None else x if gate is None else gate * x
        for term, w, b, e in zip(terms, weight, bias, eps, strict=True):
            term = F.batch_norm(term, None, None, w, b, True, eps=e)
            corners = {"align_corners": align_corners} if mode == "bilinear" else {}
            total = total + F.interpolate(term, size, mode=mode, **corners)
        return total.relu() if activation == "relu" else total

    exact, eager, found = run(plain, torch.float64), run(plain, torch.float32), run(ours, torch.float32)
    for i, (f, e, p) in enumerate(zip(found, exact, eager, strict=True)):
        assert_close(f, e, p, f"gradient {i}", 2e-5, 0.5)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 18, 8, 8), (3, 36, 8, 4), (1, 130, 5, 7), (2, 48, 33, 5), (3, 1, 4, 5), (2, 70, 1, 1)], ids=str
)
def sweep_channel_statistics(shape, dtype, last):
    x = layout(parameter(*shape, dtype=dtype) + 2, last)
    mean, var = check("statistics", OPS.channel_statistics, reference.channel_statistics, (x,), torch.float32)
    assert mean.dtype == var.dtype == torch.float32 and mean.shape == var.shape == shape[1:2]


@layouts
def sweep_statistics_survive_large_means_and_outliers(monkeypatch, last):
    """The variance of values whose mean is 1e4 standard deviations away; and that of zeros with one large first value."""
    from gsto_ops.triton import reduce

    monkeypatch.setattr(reduce, "ROWS", 4)  # several levels for few ranges
    x = layout(100 + torch.randn(6, 24, 16, 16) * 0.01, last)
    mean, var = OPS.channel_statistics(x)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    x = torch.zeros_like(x)
    x[0, :, 0, 0] = 1e4
    _, var = OPS.channel_statistics(x)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


# batch, channels, size, rows of the projections, gated copies, gates without either, activation
SPLITS = [
    (2, 18, (4, 5), [3, 17], 2, 0, "none"),
    (1, 96, (3, 11), [48], 2, 1, "relu"),  # one tile of all channels in 16 bits, blocks of channels in 32
    (1, 130, (5, 7), [70], 0, 1, "none"),
    (2, 48, (3, 4), [], 3, 1, "relu"),
    (3, 1, (4, 4), [1, 1, 2], 0, 1, "none"),
    (1, 300, (3, 3), [20, 5], 1, 0, "relu"),  # blocks of channels both ways
    (1, 520, (2, 2), [], 2, 0, "none"),
    (2, 36, (1, 1), [18], 1, 0, "none"),
]


@layouts
@pytest.mark.parametrize(
    "case, dtype", [(c, torch.float32) for c in SPLITS] + [(c, d) for c in SPLITS[1:4] for d in DTYPES[1:]], ids=str
)
def sweep_gated_split(case, dtype, last):
    batch, channels, size, split, copies, others, activation = case
    gates = len(split) + copies + others
    x = layout(parameter(batch, channels, *size, dtype=dtype), last)
    rho = parameter(gates, channels, 1, 1, dtype=dtype, scale=channels**-0.5)
    bias = parameter(gates, dtype=dtype) if activation == "relu" else None
    weight = parameter(sum(split), channels, 1, 1, dtype=dtype, scale=channels**-0.5) if split else None
    operands = (x, rho, bias, weight, split, copies, activation)
    projected, gated, gate, mean, var = check("output", OPS.gated_split, reference.gated_split, operands, dtype)
    assert all(g.stride() == x.stride() for g in gated) and gate.is_contiguous()
    assert [z.stride() for z in projected] == [
        layout(z, layout_of(x) == torch.channels_last).stride() for z in projected
    ]
    assert mean.dtype == var.dtype == torch.float32 and len(mean) == len(var) == sum(split)

    grads = [[parameter(*m.shape, dtype=dtype) for m in maps] for maps in (projected, gated)]
    grads = [[layout(g, k % 2 == 0) for k, g in enumerate(found)] for found in grads]
    for grad_gate in (parameter(*gate.shape, dtype=dtype), None)[: 2 if dtype == torch.float32 else 1]:
        operands = (*grads, grad_gate, x, gate, rho, weight, activation)
        found = check(
            "gradient",
            OPS.gated_split_backward,
            reference.gated_split_backward,
            operands,
            dtype,
            0.5 * (x.numel() // channels) ** 0.5,
        )
        assert found[0].stride() == x.stride()


@layouts
def sweep_gradients_of_gated_split(last):
    """All the way through autograd, against autograd of the plain formula, with outputs that nobody uses."""
    x = layout(torch.randn(2, 18, 3, 5), last)
    leaves = [x, torch.randn(5, 18, 1, 1) / 4, torch.randn(5), torch.randn(20, 18, 1, 1) / 4]

    def plain(x, rho, bias, weight):
        gates = F.conv2d(x, rho, bias).sigmoid().split(1, 1)
        rows = [F.conv2d(g * x, w) for g, w in zip(gates, weight.split([7, 13]), strict=False)]
        return rows[1], gates[2] * x, gates[4]

    def ours(*operands):
        projected, gated, gate, _, _ = OPS.gated_split(*operands, [7, 13], 2, "none")
        return projected[1], gated[0], gate[:, 4:]

    results = []
    for function, dtype in ((plain, torch.float64), (plain, torch.float32), (ours, torch.float32)):
        found = [t.detach().to(dtype).requires_grad_() for t in leaves]
        outputs = function(*found)
        torch.manual_seed(1)
        grads = torch.autograd.grad(outputs, found, [torch.randn(o.shape).to(dtype) for o in outputs])
        results.append([*outputs, *grads])
    for i, (e, p, f) in enumerate(zip(*results, strict=True)):
        assert_close(f.detach(), e.detach(), p.detach(), f"result {i}", 1e-5, 0.5)


@layouts
def sweep_carriers(last):
    compare_carriers(gsto_ops.ops.library.operators["gsto_triton"], last)


@pytest.mark.parametrize("counts", [[], [2000.0, 5.0, 60.0]], ids=["pixels", "counts"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def sweep_update_running_statistics(dtype, momentum, counts):
    """Buffers of any dtype; of 264 channels, of strided ones and of a norm that is there twice."""
    torch.manual_seed(0)
    channels = (264, 7, 7)
    mean, var = ([f(c) for c in channels] for f in (torch.randn, torch.rand))
    running = [[f(c).to(dtype) for c in channels[:2]] for f in (torch.randn, torch.rand)]
    running[0][1] = torch.cat([running[0][1]] * 2).view(2, 7).t()[:, 0]
    buffers = [[*r, r[1]] for r in (*running, [torch.tensor(3), torch.tensor(4)])]
    others = [[*r, r[1]] for r in ([t.clone() for t in each[:2]] for each in buffers)]
    rest = (mean, var, [1000, 2, 30], [torch.tensor(n) for n in counts], momentum)
    OPS.update_running_statistics_(*buffers, *rest)
    reference.update_running_statistics_(*others, *rest)
    tiny = TINY.get(dtype, 1e-6)
    torch.testing.assert_close(buffers, others, rtol=tiny, atol=tiny)
    assert [int(n) for n in buffers[2]] == [4, 6, 6]


@pytest.mark.parametrize("name", OPERATORS)
def sweep_opcheck(name):
    check_operator("gsto_triton", name)


def everything(x, gate, same, small, dy):
    """All operators, forward and backward, as one list of results."""
    vectors = [torch.linspace(low, 1.5, x.shape[1]) for low in (-1, 0.5, 1, -2)]
    terms, norms = [same, small], [[v, v.flip(0)] for v in vectors]
    output = OPS.batch_norm_sum(x, gate, terms, *norms, [1e-5] * 2, False, None, None, "relu", "bilinear", False)
    dm, gathered, sums = OPS.batch_norm_sum_backward(dy, output, terms, *norms[:2], [1e-5] * 2, "bilinear", False)
    grads = OPS.batch_norm_sum_backward_terms(dm, gathered, terms, *norms[:3], [1e-5] * 2, sums, None)
    rho, weight = (torch.linspace(-0.3, 0.2, n * x.shape[1]).reshape(n, -1, 1, 1) for n in (3, 5))
    projected, copies, gates, *statistics = OPS.gated_split(x, rho, None, weight, [5], 1, "relu")
    split_grads = OPS.gated_split_backward([dy[:, :5]], [same], gate.expand_as(gates), x, gates, rho, weight, "relu")
    found = [output, dm, *gathered, sums, *grads, *projected, *copies, gates, *split_grads]
    return [*found, *statistics, *OPS.channel_statistics(same)]


@layouts
def sweep_any_strides(last):
    """Sliced, offset, transposed and expanded operands give what their dense copies give."""
    source = layout(torch.randn(2, 24, 7, 9), last)
    x, same = source[:, 2:20, 1:, :6], torch.randn(18, 6, 6, 2).permute(3, 0, 2, 1)
    small = source[:1, 6:, :3, 2:5].expand(2, -1, -1, -1)
    gate = torch.rand(2, 6, 6, 3).permute(0, 3, 1, 2)[:, 1:2]
    dy = torch.randn(1, 18, 1, 6).expand(2, -1, 6, -1)
    found = everything(x, gate, same, small, dy)
    dense = [layout(t, t.stride(1) == 1 and t.stride(3) > 1) for t in (x, gate, same, small)]
    for a, b in zip(found, everything(*dense, dy.contiguous()), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@layouts
def sweep_wide_offsets(monkeypatch, last):
    """With 64-bit offsets inside images, to the bit the same."""
    from gsto_ops.triton import norm, norm_backward, product, resample, split, split_backward

    x, same, dy = (layout(torch.randn(2, 18, 4, 6), last) for _ in range(3))
    operands = (x, torch.rand(2, 1, 4, 6), same, layout(torch.randn(2, 18, 2, 3), last), dy)
    narrow = everything(*operands)
    for module in (norm, norm_backward, product, resample, split, split_backward):
        monkeypatch.setattr(module, "is_wide", lambda *maps: True)
    for a, b in zip(everything(*operands), narrow, strict=True):
        assert torch.equal(a, b)


def sweep_pixels_side_by_side():
    """Dense channels_last maps that are alike become maps of a multiple of 64 channels where their pixels divide."""
    from gsto_ops.triton.launch import folded

    x = torch.empty(2, 18, 8, 8).to(memory_format=torch.channels_last)
    assert folded(x, x) == (32, (1, 1, 4, [(1152, 1, 0, 576)] * 2))
    assert folded(x[:, :, :, :7])[0] == 1 and folded(x.contiguous())[0] == 1 and folded(x, x[:, :1])[0] == 1
    assert folded(x[:, :, :5, :5].contiguous(memory_format=torch.channels_last))[0] == 2
    assert folded(torch.empty(1, 64, 3, 3).to(memory_format=torch.channels_last))[0] == 1
    assert folded(x[:0])[0] == 32


@layouts
def sweep_empty_batch(last):
    x, small = layout(torch.randn(0, 18, 6, 6), last), layout(torch.randn(0, 18, 3, 3), last)
    *found, mean, var, mean_of_x, var_of_x = everything(x, torch.rand(0, 1, 6, 6), x, small, x)
    output, dm, gathered, sums, same, small_grad, projected, copy, gates, grad_input, *grads = found
    assert all(m.shape == x.shape for m in (output, dm, same, copy, grad_input))
    assert gathered.shape == small_grad.shape == small.shape
    assert projected.shape == (0, 5, 6, 6) and gates.shape == (0, 3, 6, 6)
    assert all((g == 0).all() for g in (sums, *grads))
    assert all(s.isnan().all() for s in (mean, var, mean_of_x, var_of_x))


def sweep_nan_passes_relu():
    x = torch.randn(1, 4, 2, 2)
    x[0, 1, 1, 1] = float("nan")
    out = OPS.batch_norm_sum(x, None, [], [], [], [], [], [], False, None, None, "relu", "bilinear", False)
    assert torch.equal(out.isnan(), x.isnan())


def sweep_unknown_mode():
    x = torch.randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match="mode must be 'bilinear' or 'nearest', got 'avg'"):
        OPS.batch_norm_sum(x, None, [x], [], [], [], [], [], False, None, None, "none", "avg", False)
