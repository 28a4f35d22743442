"""The CUDA kernels of the fusion, gated_split, channel_statistics and batch_norm_sum, against the float64 reference.

They run in the emulator, and on a GPU where there is one.
"""

import pytest
import single_norm
import torch
from gated_kernels import DTYPES, layout

from gsto_ops import reference

# Of the results' rounding: a unit in the last place of the largest value, or the float32 arithmetic's.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
NO_NORMS = ([], [], [], [], [])


@pytest.fixture
def ops(cuda_operators):
    return cuda_operators


@pytest.fixture(params=[False, True], ids=["nchw", "channels_last"])
def channels_last(request):
    return request.param


def wide(value):
    """``value`` with its tensors in float64."""
    if isinstance(value, (list, tuple)):
        return type(value)(wide(item) for item in value)
    return value.double() if isinstance(value, torch.Tensor) else value


def assert_near(found, exact, tolerance, name):
    assert found.shape == exact.shape, f"{name}: shape {tuple(found.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error = ((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)).item()
    assert error <= tolerance, f"{name}: error {error:.3g} of the largest value, allowed {tolerance:.3g}"


# Channels that are whole units of 16 bytes, that are by 2 and 4 pixels at a time, and that never are; several blocks.
SHAPES = [
    (2, 18, 9, 14),
    (1, 48, 8, 16),
    (3, 130, 4, 5),
    (2, 36, 6, 6),
    (1, 1, 5, 3),
    (2, 8, 33, 40),
    (1, 17, 3, 5),
    (2, 264, 5, 4),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_statistics(ops, shape, dtype, channels_last):
    x = layout((3 + torch.randn(shape)).to(dtype), channels_last)
    mean, var = ops.channel_statistics(x)
    exact_mean, exact_var = reference.channel_statistics(x.double())
    assert mean.dtype == var.dtype == torch.float32
    assert_near(mean, exact_mean, 1e-6, "mean")
    assert_near(var, exact_var, 3e-6, "var")


def test_statistics_survive_a_large_mean(ops, channels_last):
    """Σx² - (Σx)²/n in float32 would lose a variance that is 1e-8 of the squared mean, and so would one shift for all."""
    x = layout(100 + torch.randn(4, 8, 16, 16) * 0.01, channels_last)
    x[0, :, 0, 0] = 0
    x[1, 0] = 0
    mean, var = ops.channel_statistics(x)
    exact_mean, exact_var = reference.channel_statistics(x.double())
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-4, atol=0)


def test_statistics_of_nothing_are_nan(ops):
    mean, var = ops.channel_statistics(torch.empty(0, 3, 4, 4))
    assert mean.isnan().all() and var.isnan().all()


# (N, C, H, W), terms of that size, sizes of further terms, input ("gated" with its gate)
SUMS = [
    ((2, 18, 9, 13), 1, [], "absent"),
    ((3, 48, 8, 16), 1, [], "there"),
    ((2, 18, 8, 8), 2, [], "gated"),
    ((2, 9, 5, 16), 0, [(3, 8), (1, 1)], "gated"),
    ((2, 130, 6, 10), 1, [(3, 5)], "absent"),
    ((5, 16, 20, 24), 1, [(10, 12), (5, 6), (7, 40)], "there"),  # several chunks of images
    ((1, 264, 5, 4), 3, [(2, 2)], "absent"),
    ((0, 18, 4, 4), 1, [(2, 2)], "there"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", single_norm.SHAPES, ids=str)
def test_mask_of_a_single_norm(ops, shape, dtype, channels_last):
    single_norm.compare_masks(ops, shape, dtype, channels_last)


def make_sum(case, dtype, channels_last, normed=True):
    shape, same, low, given = case
    channels = shape[1]
    maps = [torch.randn(*shape[:2], *size).to(dtype) for size in [shape[2:]] * same + low]
    terms = [layout(term, channels_last) for term in maps]
    norms = [[torch.randn(channels) for _ in terms] for _ in range(4)] + [[1e-5, 1e-3, 1e-2, 1e-1][: len(terms)]]
    norms[1] = [values.abs() + 0.1 for values in norms[1]]
    input = None if given == "absent" else layout(torch.randn(shape).to(dtype), channels_last)
    gate = torch.rand(shape[0], 1, *shape[2:]).to(dtype) if given == "gated" else None
    return input, gate, terms, *(norms if normed else NO_NORMS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUMS, ids=str)
@pytest.mark.parametrize(
    "normed, activation, mode, align_corners",
    [(True, "relu", "bilinear", False), (True, "none", "bilinear", True), (False, "relu", "nearest", False)],
)
def test_batch_norm_sum(ops, case, normed, activation, mode, align_corners, dtype, channels_last):
    input, _, terms, mean, var, weight, _, eps = operands = make_sum(case, dtype, channels_last, normed)
    shape, tolerance = case[0], TOLERANCE[dtype]
    statistics, resampling = (mean, var, eps), (mode, align_corners)
    output = ops.batch_norm_sum(*operands, True, None, None, activation, *resampling)
    first = terms[0] if input is None else input
    assert output.stride() == layout(torch.empty(shape), channels_last).stride() and output.dtype == first.dtype
    grad_output = layout(torch.randn(shape).to(dtype), channels_last)
    mask = output if activation == "relu" else None
    found = ops.batch_norm_sum_backward(grad_output, mask, terms, *statistics, *resampling)
    if shape[0] == 0:
        assert output.shape == shape and not found[2].any()
        return
    assert_near(output, reference.batch_norm_sum(*wide(operands), activation, *resampling), tolerance, "output")
    exact = reference.batch_norm_sum_backward(*wide((grad_output, mask, terms, *statistics)), *resampling)
    assert_near(found[0], exact[0], tolerance, "grad_sum")
    for k, (a, b) in enumerate(zip(found[1], exact[1], strict=True)):
        assert_near(a, b, tolerance, f"gathered {k}")
    # Gathered gradients are rounded to the maps' dtype, their sums are not.
    assert_near(found[2], exact[2], 1e-5, "sums")
    if not normed:
        return
    grad_sum = grad_output if mask is None else found[0]
    for sums, counts in ((None, None), (found[2], None), (found[2], 50 + torch.rand(len(terms)))):
        arguments = (grad_sum, found[1], terms, mean, var, weight, eps, sums, counts)
        results = ops.batch_norm_sum_backward_terms(*arguments)
        exact_results = reference.batch_norm_sum_backward_terms(*wide(arguments))
        for k, (a, b) in enumerate(zip(results, exact_results, strict=True)):
            assert a.stride() == terms[k].stride() and a.dtype == dtype
            assert_near(a, b, tolerance, f"gradient of term {k}")


def test_sums_of_a_term_far_from_zero(ops, channels_last):
    """Σ grad · (term - mean) is summed as such: Σ grad · term - mean · Σ grad would lose it in the mean's rounding."""
    term, small = (layout(1e4 + torch.randn(2, 8, *size), channels_last) for size in ((16, 16), (8, 8)))
    grad = torch.randn(2, 8, 16, 16)
    mean, var = [x.mean((0, 2, 3)) for x in (term, small)], [torch.rand(8) + 1e-3 for _ in range(2)]
    operands = (grad, None, [term, small], mean, var, [1e-5, 1e-3], "bilinear", False)
    sums, exact = ops.batch_norm_sum_backward(*operands)[2], reference.batch_norm_sum_backward(*wide(operands))[2]
    assert_near(sums, exact, 1e-5, "sums")


def test_any_layouts_and_strides_together(ops, channels_last):
    """Views, an expanded gradient and terms of the other layout give what dense operands give, to the bit."""
    input, gate, terms, *norms = make_sum(((2, 18, 6, 7), 2, [(3, 4)], "gated"), torch.bfloat16, channels_last)
    tail = (True, None, "group", "relu", "bilinear", False)
    grad = torch.randn(18, 1, 1).bfloat16()
    results = []
    for plain in (True, False):
        maps, x, g, dy = terms, input, gate, grad.expand(2, 18, 6, 7)
        if plain:
            dy = layout(dy, channels_last)
        else:
            maps = [torch.cat([t, t], 3)[..., : t.shape[3]] for t in terms[:1]] + [
                layout(t, not channels_last) for t in terms[1:]
            ]
            x, g = torch.cat([x, x], 1)[:, :18], torch.cat([g, g], 1)[:, 1:]
        output = ops.batch_norm_sum(x, g, maps, *norms, *tail)
        found = ops.batch_norm_sum_backward(dy, output, maps, *norms[:2], norms[4], "bilinear", False)
        grads = ops.batch_norm_sum_backward_terms(found[0], found[1], maps, *norms[:3], norms[4], found[2], None)
        assert found[1][0].stride() == maps[2].stride()
        assert [g.stride() for g in grads[1:]] == [m.stride() for m in maps[1:]]
        results.append([output, found[0], *found[1], found[2], *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_an_offset_of_one_element(ops, channels_last):
    """Maps whose address allows no 16-byte access."""

    def shifted(*shape):
        x = torch.randn(1 + shape[0] * shape[1] * shape[2] * shape[3]).bfloat16()[1:]
        n, c, h, w = shape
        return x.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else x.view(shape)

    term, small, dy = shifted(2, 16, 4, 8), shifted(2, 16, 2, 4), shifted(2, 16, 4, 8)
    norms = [[torch.rand(16) + 1 for _ in range(2)] for _ in range(4)] + [[1e-5, 1e-5]]
    runs = []
    for copy in (lambda x: x, lambda x: x.clone(memory_format=torch.preserve_format)):
        terms = [copy(term), copy(small)]
        output = ops.batch_norm_sum(None, None, terms, *norms, True, None, None, "relu", "bilinear", False)
        found = ops.batch_norm_sum_backward(copy(dy), copy(output), terms, *norms[:2], norms[4], "bilinear", False)
        mean, var = ops.channel_statistics(terms[0])
        runs.append([output, found[0], *found[1]])
        assert_near(mean, terms[0].double().mean((0, 2, 3)), 1e-6, "mean")
        assert_near(var, terms[0].double().var((0, 2, 3), correction=0), 3e-6, "var")
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_results_repeat_to_the_bit(ops, channels_last):
    _, _, terms, *norms = make_sum(SUMS[5], torch.bfloat16, channels_last)
    dy = torch.randn(SUMS[5][0]).bfloat16()
    runs = []
    for _ in range(2):
        _, gathered, sums = ops.batch_norm_sum_backward(dy, None, terms, *norms[:2], norms[4], "bilinear", False)
        runs.append([*gathered, sums, *ops.channel_statistics(dy)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# (N, C, H, W), split, copies, gates
SPLITS = [
    ((2, 18, 9, 13), [], 4, 4),
    ((1, 48, 8, 16), [18], 2, 3),
    ((3, 130, 4, 5), [70, 3, 20], 0, 4),  # row tiles of several projections; a gate that is only computed
    ((4, 64, 12, 16), [64, 96], 1, 3),  # several chunks of images
    ((1, 40, 5, 9), [70, 30], 1, 3),  # so few pixels that row tiles are spread over blocks
    ((1, 36, 5, 16), [7, 9], 3, 7),  # more gates than one reading sums
    ((2, 17, 3, 3), [], 5, 6),
    ((3, 16, 8, 24), [], 0, 2),  # gates alone; blocks that take several tiles
    ((1, 1, 1, 1), [1], 1, 2),
    ((0, 18, 4, 4), [5], 1, 2),
]


def make_split(case, dtype, channels_last, activation):
    shape, split, copies, gates = case
    channels = shape[1]
    x = layout(torch.randn(shape).to(dtype), channels_last)
    rho = (torch.randn(gates, channels, 1, 1) * channels**-0.5).to(dtype)
    bias = torch.randn(gates).to(dtype) if activation == "relu" else None
    weight = (torch.randn(sum(split), channels, 1, 1) * channels**-0.5).to(dtype) if split else None
    return (x, rho, bias, weight), (split, copies, activation)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_gated_split(ops, case, dtype, activation, channels_last):
    operands, options = make_split(case, dtype, channels_last, activation)
    x, tolerance = operands[0], 2 * TOLERANCE[dtype]
    projected, gated, gate, mean, var = ops.gated_split(*operands, *options)
    assert all(y.stride() == layout(torch.empty(y.shape), channels_last).stride() for y in projected + gated)
    assert gate.is_contiguous() and mean.dtype == var.dtype == torch.float32
    grads = [[torch.randn_like(y) for y in maps] for maps in (projected, gated)]
    # Of gates that only are computed there is no other gradient.
    grad_gate = torch.randn_like(gate) if gate.shape[1] > len(gated) + len(projected) else None
    arguments = (*grads, grad_gate, x, gate, operands[1], operands[3], activation)
    found = ops.gated_split_backward(*arguments)
    assert found[0].stride() == x.stride()
    if x.shape[0] == 0:
        assert not any(grad.any() for grad in found)
        return
    exact = reference.gated_split(*wide(operands), *options)
    for k, (a, b) in enumerate(zip(projected + gated, exact[0] + exact[1], strict=True)):
        assert_near(a, b, tolerance, f"map {k}")
    assert_near(gate, exact[2], tolerance, "gate")
    if projected:  # the statistics are those of the maps as they are stored
        statistics = [reference.channel_statistics(z.double()) for z in projected]
        assert_near(mean, torch.cat([m for m, _ in statistics]), 1e-5, "mean")
        assert_near(var, torch.cat([v for _, v in statistics]), 1e-5, "var")
    exact = reference.gated_split_backward(*wide(arguments))
    eager = reference.gated_split_backward(*arguments)
    names = ("input", "gate_weight", "gate_bias", "weight")
    for name, a, b, e in zip(names, found, exact, eager, strict=True):
        same_dtype = 0 if b.numel() == 0 else ((e.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()
        assert_near(a, b, 2 * same_dtype + 2 * TOLERANCE[dtype], f"gradient of {name}")


def test_gated_split_of_any_strides(ops, channels_last):
    """Views and expanded gradients give what dense operands give, to the bit; and so does a second call."""
    (x, rho, _, weight), options = make_split(SPLITS[3], torch.bfloat16, channels_last, "none")
    view = torch.cat([x, x], 1)[:, : x.shape[1]]
    narrow = torch.cat([weight, weight], 1)[:, : weight.shape[1]]
    runs = []
    for given, matrix in ((x, weight), (view, narrow)):
        projected, gated, gate, mean, var = ops.gated_split(given, rho, None, matrix, *options)
        seed = torch.tensor(0.5).bfloat16()
        grads = [[seed.expand(y.shape) for y in maps] for maps in (projected, gated)]
        if given is x:
            grads = [[layout(g, channels_last) for g in maps] for maps in grads]
        found = ops.gated_split_backward(*grads, None, given, gate, rho, matrix, "none")
        runs.append([*projected, *gated, gate, mean, var, *found])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_carriers(ops, channels_last):
    """They take no memory, and no other result changes; the sum reads one of several gates where it is."""
    (x, rho, bias, weight), (split, _, activation) = make_split(SPLITS[1], torch.float32, channels_last, "none")
    alone = ops.gated_split(x, rho, bias, weight, split, 1, activation)
    projected, (copy, carrier), *others = ops.gated_split(x, rho, bias, weight, split, 1, activation, 1)
    assert carrier.shape == x.shape and carrier.stride() == (0,) * 4 and not carrier.any()
    for a, b in zip((*projected, copy, *others), (*alone[0], *alone[1], *alone[2:]), strict=True):
        assert torch.equal(a, b)
    small = layout(torch.randn(1, 48, 4, 8), channels_last)
    batch = [torch.cat([t, t.flip(0)]) for t in (x, copy, small, others[0])]
    x, copy, small, gate = (layout(t, channels_last) for t in batch)
    for terms in ([copy, small], [copy]):
        operands = (x, gate[:, 1:2], terms)
        found = ops.batch_norm_sum(*operands, *NO_NORMS, False, None, None, "relu", "bilinear", False, carrier)
        assert_near(found, reference.batch_norm_sum(*wide(operands), *NO_NORMS, "relu", "bilinear"), 1e-5, "output")


def test_gates_do_not_use_tf32(ops, channels_last):
    """Where TF32 is allowed, projections use it and gates do not: they are sums of the product's operands, not of its results."""
    (x, rho, bias, weight), options = make_split(SPLITS[3], torch.float32, channels_last, "relu")
    exact = reference.gated_split(*wide((x, rho, bias, weight)), *options)
    ops.set_allow_tf32(True)
    projected, gated, gate, _, _ = ops.gated_split(x, rho, bias, weight, *options)
    ops.set_allow_tf32(False)
    assert_near(gate, exact[2], 1e-6, "gate")
    assert_near(gated[0], exact[1][0], 1e-6, "gated")
    error = (projected[0].double() - exact[0][0]).abs().max() / exact[0][0].abs().max()
    assert 1e-5 < error < 5e-3


def test_bad_operands_are_named(ops):
    x, c = torch.randn(1, 4, 5, 5), torch.ones(4)
    norms, tail = ([c], [c], [c], [c], [1e-5]), (True, None, None, "relu", "bilinear", False)
    with pytest.raises(RuntimeError, match="mode must be bilinear or nearest, got avg"):
        ops.batch_norm_sum(None, None, [x], *norms, True, None, None, "relu", "avg", False)
    with pytest.raises(RuntimeError, match=r"a term must have shape \(1, 4, 5, 5\).*\(1, 3, 5, 5\)"):
        ops.batch_norm_sum(x, None, [x[:, :3]], *norms, *tail)
    with pytest.raises(RuntimeError, match="terms must be 1 to 8 maps on CUDA, got 9"):
        ops.batch_norm_sum(x, None, [x] * 9, *NO_NORMS, *tail)
    with pytest.raises(RuntimeError, match="var must have as many entries as mean, 1, got 0"):
        ops.batch_norm_sum(x, None, [x], norms[0], [], *norms[2:], *tail)
    with pytest.raises(RuntimeError, match=r"weight must have shape \(4\).*got \(3\)"):
        ops.batch_norm_sum(x, None, [x], *norms[:2], [c[:3]], *norms[3:], *tail)
    with pytest.raises(RuntimeError, match="gate without input"):
        ops.batch_norm_sum(None, x[:, :1], [x], *norms, *tail)
    with pytest.raises(RuntimeError, match="gathered must have an entry per term of another size"):
        ops.batch_norm_sum_backward_terms(x, [], [x[..., :2]], *norms[:3], norms[4], None, None)
    rho, weight = torch.randn(2, 4, 1, 1), torch.randn(3, 4, 1, 1)
    with pytest.raises(RuntimeError, match="1 projections, 2 copies and 0 carriers need as many gates, got 2"):
        ops.gated_split(x, rho, None, weight, [3], 2, "none")
    with pytest.raises(RuntimeError, match=r"weight must have shape \(4, 4, 1, 1\)"):
        ops.gated_split(x, rho, None, weight, [3, 1], 0, "none")
    with pytest.raises(RuntimeError, match="weight must be None for 0 projections"):
        ops.gated_split(x, rho, None, weight, [], 1, "none")
    with pytest.raises(RuntimeError, match="gate_weight must have 1 to 8 gates on CUDA"):
        ops.gated_split(x, torch.randn(9, 4, 1, 1), None, None, [], 1, "none")
