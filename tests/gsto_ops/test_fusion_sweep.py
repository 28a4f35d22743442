"""gated_split, batch_norm_sum and channel_statistics on the native backends against float64: dtypes, layouts, odd sizes.

The bound is twice the error of plain PyTorch in the same dtype, plus a few units in the last place of the largest value.
"""

import pytest
import torch
from carriers import compare_carriers
from single_norm import SHAPES, compare_masks

import gsto_ops
from gsto_ops import reference
from gsto_ops.ops.library import operators

PLACES = [
    pytest.param("cpu", "cpu"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NHWC = torch.channels_last
LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "nhwc": lambda x: x.contiguous(memory_format=NHWC),
    "sliced rows": lambda x: torch.cat([x, x], 2).contiguous(memory_format=NHWC)[:, :, : x.shape[2]],
    "sliced nhwc": lambda x: torch.cat([x, x], 1).contiguous(memory_format=NHWC)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
# (N, C, H, W) and the sizes of the terms
SUMS = [
    ((2, 18, 12, 20), [(12, 20)]),
    ((2, 48, 8, 12), [(4, 6), (8, 12), (2, 3)]),
    ((3, 36, 9, 13), [(5, 7), (3, 4), (2, 2)]),
    ((1, 130, 7, 5), [(7, 5), (7, 5)]),
    ((2, 1, 6, 5), [(3, 3)]),
    ((2, 5, 1, 9), [(1, 5), (1, 9)]),
    ((2, 64, 3, 3), [(1, 1), (6, 6)]),
    ((0, 18, 4, 4), [(2, 2), (4, 4)]),
]
# (N, C, H, W), rows of every projection, copies, gates
SPLITS = [
    ((2, 18, 9, 13), [], 3, 4),
    ((2, 36, 8, 12), [18], 2, 4),
    ((1, 144, 5, 7), [18, 36, 72], 1, 4),
    ((3, 130, 3, 5), [33, 1], 0, 2),
    ((2, 1, 6, 5), [1], 1, 3),
    ((0, 18, 4, 4), [5], 1, 2),
]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend, device", PLACES)


def operators_of(backend):
    if backend not in gsto_ops.available_backends():
        pytest.skip(f"backend {backend!r} is not available: {gsto_ops.backends.why_not(backend)}")
    return operators["gsto_triton" if backend == "triton" else "gsto_ops"]


def check(ours, plain, exact, dtype, names):
    for name, o, p, e in zip(names, ours, plain, exact, strict=True):
        assert o.shape == e.shape, name
        if e.numel() == 0:
            continue
        error, allowed = (o.double() - e).abs().max(), (p.double() - e).abs().max()
        scale = e.abs().max()
        unit = torch.finfo(torch.promote_types(o.dtype, dtype)).eps
        assert error <= 2 * allowed + 8 * unit * scale + 1e-30, (
            f"{name}: error {error}, plain PyTorch's {allowed}, largest {scale}"
        )


def run_sum(function, maps, gate, norms, seed, activation, mode, align_corners, training):
    """Output and gradients; ``function`` takes the maps and the statistics that a norm in this mode takes."""
    input, *terms = (x.requires_grad_() for x in maps)
    half = len(norms) // 2
    weight, bias = norms[:half], norms[half:]
    output = function(input, gate, terms, weight, bias)
    operands = [input, *terms, *norms]
    grads = torch.autograd.grad(output, operands, seed.to(output.dtype))
    return [output, *grads], [
        "output",
        "grad_input",
        *(f"grad of term {k}" for k in range(len(terms))),
        *(f"norm {k}" for k in range(len(norms))),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "training, activation, mode, align_corners",
    [(True, "relu", "bilinear", False), (True, "none", "bilinear", True), (False, "relu", "nearest", False)],
)
@pytest.mark.parametrize("case", range(len(SUMS)))
def test_batch_norm_sum(backend, device, case, training, activation, mode, align_corners, dtype, layout):
    ops = operators_of(backend)
    shape, sizes = SUMS[case]
    if training and shape[0] == 0:
        pytest.skip("batch statistics of an empty batch are NaN in PyTorch, too")
    torch.manual_seed(case)
    channels = shape[1]
    maps = [
        torch.randn(shape, device=device),
        *(torch.randn(*shape[:2], *size, device=device) * 2 + 1 for size in sizes),
    ]
    norms = [torch.rand(channels, device=device) + 0.5 for _ in sizes] + [
        torch.randn(channels, device=device) for _ in sizes
    ]
    seed = torch.randn(shape, device=device).to(dtype).double()
    eps = [1e-5] * len(sizes)
    constants = [torch.full((channels,), value, device=device) for value in (0.3, 1.7)]

    def cast(to):
        wide = torch.promote_types(to, torch.float32)
        return [LAYOUTS[layout](x.to(dtype).to(to)).detach() for x in maps], [
            x.detach().to(wide).requires_grad_() for x in norms
        ]

    def statistics(of, terms):
        if training:
            return zip(*(of(t.detach()) for t in terms), strict=True)
        return [[x.to(torch.promote_types(terms[0].dtype, torch.float32))] * len(terms) for x in constants]

    def native(input, gate, terms, weight, bias):
        mean, var = map(list, statistics(ops.channel_statistics, terms))
        norm = (mean, var, weight, bias, eps, training, None, None)
        return ops.batch_norm_sum(input, gate, terms, *norm, activation, mode, align_corners)

    def plain(input, gate, terms, weight, bias):
        if training:
            mean, var = zip(*(reference.channel_statistics(t) for t in terms), strict=True)
        else:
            mean, var = statistics(None, terms)
        return reference.batch_norm_sum(
            input, gate, terms, mean, var, weight, bias, eps, activation, mode, align_corners
        )

    options = (seed, activation, mode, align_corners, training)
    ours, names = run_sum(native, cast(dtype)[0], None, cast(dtype)[1], *options)
    again, _ = run_sum(native, cast(dtype)[0], None, cast(dtype)[1], *options)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), "not deterministic"
    same_dtype, _ = run_sum(plain, cast(dtype)[0], None, cast(dtype)[1], *options)
    exact, _ = run_sum(plain, cast(torch.float64)[0], None, cast(torch.float64)[1], *options)
    if activation == "relu":  # where rounding alone decides whether the ReLU is open, gradients cannot agree
        mask = (ours[0] > 0) == (exact[0] > 0)
        assert mask.double().mean() > 0.97 if mask.numel() else True
        if not mask.all():
            ours, same_dtype, exact, names = ours[:1], same_dtype[:1], exact[:1], names[:1]
    check(ours, same_dtype, exact, dtype, names)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_of_a_single_norm(backend, device, shape, dtype, channels_last):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("GPU kernels have no float64")
    compare_masks(operators_of(backend), shape, dtype, channels_last, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
def test_batch_norm_sum_without_norms_and_with_a_gate(backend, device, dtype, memory_format):
    ops = operators_of(backend)
    torch.manual_seed(0)
    input, small = (
        torch.randn(2, 19, *size, device=device).to(dtype).to(memory_format=memory_format)
        for size in ((10, 14), (5, 7))
    )
    gate = torch.rand(2, 1, 10, 14, device=device).to(dtype)
    for given, terms in ((None, [input, small]), (gate, [small])):
        first = None if given is None else input
        rest = ([], [], [], [], [])
        ours = ops.batch_norm_sum(first, given, terms, *rest, False, None, None, "relu", "bilinear", False)
        wide = (
            [x.double() for x in terms],
            None if given is None else given.double(),
            None if first is None else first.double(),
        )
        exact = reference.batch_norm_sum(wide[2], wide[1], wide[0], *rest, "relu", "bilinear")
        plain = reference.batch_norm_sum(first, given, terms, *rest, "relu", "bilinear")
        check([ours], [plain], [exact], dtype, ["output"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("case", range(len(SPLITS)))
def test_gated_split(backend, device, case, activation, dtype, layout):
    ops = operators_of(backend)
    shape, split, copies, gates = SPLITS[case]
    torch.manual_seed(case)
    channels = shape[1]
    tensors = [
        torch.randn(shape, device=device),
        torch.randn(gates, channels, 1, 1, device=device) / channels**0.5,
        torch.randn(gates, device=device),
    ]
    if split:
        tensors.append(torch.randn(sum(split), channels, 1, 1, device=device) / channels**0.5)

    def run(function, to):
        x, *rest = (t.to(dtype).to(to) for t in tensors)
        x, rest = LAYOUTS[layout](x).detach().requires_grad_(), [t.detach().requires_grad_() for t in rest]
        weight = rest[2] if split else None
        projected, gated, gate, mean, var = function(x, rest[0], rest[1], weight, split, copies, activation)
        outputs = [*projected, *gated, gate]
        torch.manual_seed(1)
        seeds = [torch.randn(o.shape, device=device).to(dtype).to(to) for o in outputs]
        grads = torch.autograd.grad(outputs, [x, *rest], seeds)
        return [*outputs, mean, var, *grads]

    ours, again = run(ops.gated_split, dtype), run(ops.gated_split, dtype)
    if shape[0]:
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), "not deterministic"
    plain, exact = run(reference.gated_split, dtype), run(reference.gated_split, torch.float64)
    names = [f"result {i}" for i in range(len(ours))]
    if activation == "relu" and dtype != torch.float32:  # a gate that rounds to 0.5 counts as one with a closed ReLU
        forward = len(split) + copies + 3
        ours, plain, exact, names = (values[:forward] for values in (ours, plain, exact, names))
    if not shape[0]:  # the statistics of nothing are NaN
        keep = [i for i, e in enumerate(exact) if not e.isnan().any()]
        ours, plain, exact, names = ([values[i] for i in keep] for values in (ours, plain, exact, names))
    check(ours, plain, exact, dtype, names)


@pytest.mark.parametrize("channels_last", [False, True])
def test_carriers(backend, device, channels_last):
    compare_carriers(operators_of(backend), channels_last, device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 18, 9, 13), (1, 130, 17, 6), (3, 1, 5, 4), (2, 64, 1, 1)])
def test_channel_statistics(backend, device, shape, dtype, layout):
    ops = operators_of(backend)
    torch.manual_seed(0)
    # a mean of 100 deviations: what a difference of large sums would get wrong
    x = LAYOUTS[layout](
        (torch.randn(shape, device=device) + 100 * torch.randn(shape[1], 1, 1, device=device)).to(dtype)
    )
    ours, plain = ops.channel_statistics(x), reference.channel_statistics(x)
    check(ours, plain, reference.channel_statistics(x.double()), torch.float32, ["mean", "var"])
