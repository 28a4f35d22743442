"""Every Triton kernel, run by Triton's interpreter on the CPU, against float64 autograd of the plain formulas.

The interpreter is chosen when triton is imported, so the sweep (the functions called sweep_*) runs in a process of its own, in
which memory that no kernel has written holds NaN.
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gsto_ops.ops import layout_of

sys.path.insert(0, str(Path(__file__).parent))
import interpreted
from interpreted import DTYPES, TINY, assert_close, layout, layouts, parameter

NO_SCALE = (None, None)
aten = torch.ops.aten


def test_every_kernel_in_the_interpreter():
    interpreted.run_sweeps(__file__, at_least=100)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def ops():
    interpreted.prepare()
    names = ("affine_scale_transfer", "gated_projection", "gated_pyramid_pool", "gated_scale_transfer")
    return SimpleNamespace(**{name: importlib.import_module(f"gsto_ops.triton.{name}") for name in names})


def transfer(x, size, mode, align_corners=False, scale=NO_SCALE):
    if mode == "avg":
        return F.adaptive_avg_pool2d(x, size)
    if mode == "bilinear":
        return aten.upsample_bilinear2d(x, size, align_corners, *scale)
    return aten.upsample_nearest2d(x, size, *scale)


def act(x, activation):
    return x.relu() if activation == "relu" else x


def compare(formula, operands, forward, backward, seeds=None):
    """``formula`` in float64 and in the operands' dtype against the kernels: outputs, and gradients for all operands given.

    ``backward(outputs, their gradients)``; ``seeds``: which outputs have a gradient.
    """
    runs, gradients = [], None
    for dtype in (torch.float64, None):
        leaves = [o if o is None else o.detach().to(dtype or o.dtype).requires_grad_() for o in operands]
        outputs = formula(*leaves)
        gradients = gradients or [torch.randn(o.shape, dtype=torch.float64) for o in outputs]
        seeds = seeds or [True] * len(outputs)
        pairs = [(o, g.to(o.dtype)) for o, g, wanted in zip(outputs, gradients, seeds, strict=True) if wanted]
        grads = torch.autograd.grad(
            [o for o, _ in pairs], [leaf for leaf in leaves if leaf is not None], [g for _, g in pairs]
        )
        runs.append(([o.detach() for o in outputs], grads))
    (exact, exact_grads), (eager, eager_grads) = runs
    outputs = forward(*operands)
    dtype = operands[0].dtype
    for i, found in enumerate(outputs):
        # Statistics (the third output on) are sums over pixels.
        assert_close(found, exact[i], eager[i], f"output {i}", TINY[dtype], 0.05 if i < 2 else 0.5)
    given = [g.to(o.dtype) if wanted else None for g, o, wanted in zip(gradients, outputs, seeds, strict=True)]
    pixels = operands[0].numel() // operands[0].shape[1]
    for i, (found, right, plain) in enumerate(zip(backward(outputs, given), exact_grads, eager_grads, strict=True)):
        # A parameter's gradient is a sum over pixels, whose terms may cancel.
        assert_close(found, right, plain, f"gradient {i}", TINY[dtype], 0.05 if i == 0 else 0.5 * pixels**0.5)
    return outputs


def given_ones(gradients, operands):
    return [g for g, o in zip(gradients, operands, strict=True) if o is not None]


# batch, channels, out_channels (None: no projection), size, new size, mode, align_corners, scale, activation
TRANSFERS = [
    (2, 18, 36, (3, 5), (6, 10), "bilinear", False, NO_SCALE, "none"),
    (1, 36, 18, (3, 4), (9, 12), "bilinear", False, (3.2, 3.2), "relu"),
    (2, 16, 48, (4, 3), (5, 7), "bilinear", True, NO_SCALE, "none"),
    (1, 130, 70, (5, 6), (4, 3), "bilinear", False, NO_SCALE, "none"),
    (3, 24, 40, (6, 8), (3, 4), "avg", False, NO_SCALE, "none"),
    (1, 18, 36, (7, 9), (3, 4), "avg", False, NO_SCALE, "relu"),
    (1, 18, 130, (21, 22), (2, 1), "avg", False, NO_SCALE, "none"),
    (2, 1, 3, (5, 5), (10, 10), "nearest", False, NO_SCALE, "none"),
    (1, 36, 20, (9, 10), (3, 3), "nearest", False, (0.4, 0.3), "none"),
    (1, 64, 64, (6, 6), (6, 6), "bilinear", False, NO_SCALE, "relu"),
    (2, 18, 19, (5, 9), (5, 9), "avg", False, NO_SCALE, "none"),
    (1, 16, None, (3, 4), (6, 8), "bilinear", False, NO_SCALE, "relu"),
    (2, 18, None, (7, 9), (3, 4), "avg", False, NO_SCALE, "none"),
    (1, 40, None, (8, 16), (8, 16), "bilinear", False, NO_SCALE, "relu"),
    (1, 8, None, (18, 18), (2, 2), "avg", False, NO_SCALE, "none"),
    (1, 8, None, (6, 12), (8, 5), "bilinear", False, NO_SCALE, "none"),
    (1, 4, None, (18, 18), (2, 2), "avg", False, NO_SCALE, "relu"),
    (1, 520, None, (4, 4), (2, 2), "avg", False, NO_SCALE, "none"),  # more channels than a tile holds
    (1, 300, 20, (4, 3), (4, 3), "avg", False, NO_SCALE, "none"),
]
BOTH = [TRANSFERS[i] for i in (0, 4, 6, 12)]  # in every dtype


@layouts
@pytest.mark.parametrize(
    "case, dtype", [(c, torch.float32) for c in TRANSFERS] + [(c, d) for c in BOTH for d in DTYPES[1:]], ids=str
)
def sweep_gated_scale_transfer(ops, case, dtype, last):
    batch, channels, out_channels, hw, size, mode, align_corners, scale, activation = case
    x = layout(parameter(batch, channels, *hw, dtype=dtype), last)
    rho = parameter(1, channels, 1, 1, dtype=dtype, scale=channels**-0.5)
    bias = parameter(1, dtype=dtype) if out_channels is None or out_channels % 2 == 0 else None
    weight = shift = None
    if out_channels is not None:
        weight = parameter(out_channels, channels, 1, 1, dtype=dtype, scale=channels**-0.5)
        shift = parameter(out_channels, dtype=dtype) if channels % 4 == 2 else None
    operands = (x, rho, bias, weight, shift)

    def formula(x, rho, bias, weight, shift):
        gate = F.conv2d(x, rho, bias).sigmoid()
        z = gate * x
        if weight is not None:
            z = F.conv2d(z, weight, shift)
        return transfer(act(z, activation), size, mode, align_corners, scale), gate

    def forward(*operands):
        return ops.gated_scale_transfer.forward(*operands, activation, size, mode, align_corners, *scale)

    def backward(outputs, gradients):
        grads = ops.gated_scale_transfer.backward(
            layout(gradients[0], last), gradients[1], x, outputs[1], rho, weight, shift, activation, mode, align_corners, *scale
        )  # fmt: skip
        assert grads[0].stride() == x.stride() and all(g.dtype == dtype for g in grads)
        assert [g.shape for g in given_ones(grads, operands)] == [o.shape for o in operands if o is not None]
        assert weight is not None or (grads[3].shape == (0,) and grads[4].shape == (0,))
        return given_ones(grads, operands)

    output, gate = compare(formula, operands, forward, backward, [True, mode != "avg"])
    assert output.dtype == gate.dtype == dtype and gate.is_contiguous()
    assert output.stride() == layout(output, layout_of(x) == torch.channels_last).stride()


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(2, 18, 36, 5, 7), (1, 64, 70, 8, 16), (3, 130, 5, 4, 3), (2, 1, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("seeds", [(True, False, False, False), (True, True, True, True)], ids=["plain", "statistics"])
def sweep_gated_projection(ops, case, dtype, last, seeds):
    batch, channels, out_channels, *hw = case
    x = layout(parameter(batch, channels, *hw, dtype=dtype), last)
    rho = parameter(1, channels, 1, 1, dtype=dtype, scale=channels**-0.5)
    bias = parameter(1, dtype=dtype) if batch == 1 else None
    weight = parameter(out_channels, channels, 1, 1, dtype=dtype, scale=channels**-0.5)

    def formula(x, rho, bias, weight):
        gate = F.conv2d(x, rho, bias).sigmoid()
        z = F.conv2d(gate * x, weight)
        wide = z if z.dtype == torch.float64 else z.float()
        return z, gate, wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)

    def backward(outputs, gradients):
        dz, *others = gradients
        z, gate, mean, _ = outputs
        grads = ops.gated_projection.backward(layout(dz, last), *others, x, gate, rho, weight, z, mean)
        return given_ones(grads, (x, rho, bias, weight))

    outputs = compare(formula, (x, rho, bias, weight), ops.gated_projection.forward, backward, seeds)
    assert outputs[2].dtype == outputs[3].dtype == torch.float32


def sweep_statistics_survive_a_large_mean(ops, monkeypatch):
    """Sums of squares would lose a variance that is 1e-8 of the squared mean; merged variances do not, at any level."""
    from gsto_ops.triton import reduce

    monkeypatch.setattr(reduce, "ROWS", 4)  # several levels for few tiles
    x = 100 + torch.randn(8, 8, 16, 16) * 0.01
    weight = torch.eye(8)[:, :, None, None]
    _, _, mean, var = ops.gated_projection.forward(x, torch.zeros(1, 8, 1, 1), torch.full((1,), 40.0), weight)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), unbiased=False), rtol=1e-2, atol=0)


@pytest.mark.parametrize("rows", [1, 5, 16, 300])
def sweep_sum_rows(ops, monkeypatch, rows):
    from gsto_ops.triton import reduce

    monkeypatch.setattr(reduce, "ROWS", 8)
    source = torch.randn(rows, 37)
    dest, tail = torch.empty(34, dtype=torch.bfloat16), torch.empty(3)
    reduce.sum_rows(source, dest, tail)
    torch.testing.assert_close(tail, source[:, 34:].sum(0))
    torch.testing.assert_close(dest, source[:, :34].sum(0).bfloat16())


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        (2, 18, (3, 5), (6, 10), "bilinear", False, NO_SCALE, "relu"),
        (1, 130, (3, 4), (7, 5), "bilinear", True, NO_SCALE, "none"),
        (3, 24, (6, 8), (5, 4), "avg", False, NO_SCALE, "relu"),
        (1, 1, (5, 6), (10, 12), "nearest", False, (2.0, 2.0), "relu"),
        (2, 16, (7, 9), (7, 9), "bilinear", False, NO_SCALE, "relu"),
    ],
    ids=str,
)
def sweep_affine_scale_transfer(ops, case, dtype, last):
    batch, channels, hw, size, mode, align_corners, scale, activation = case
    x = layout(parameter(batch, channels, *hw, dtype=dtype), last)
    factors, shifts = torch.randn(channels), torch.randn(channels)

    def formula(x, factors, shifts):
        z = act(factors[:, None, None] * x + shifts[:, None, None], activation).to(x.dtype)
        return (transfer(z, size, mode, align_corners, scale),)

    def forward(*operands):
        return (ops.affine_scale_transfer.forward(*operands, activation, size, mode, align_corners, *scale),)

    def backward(outputs, gradients):
        gradient = layout(gradients[0], last)
        return ops.affine_scale_transfer.backward(gradient, x, factors, shifts, activation, mode, align_corners, *scale)

    compare(formula, (x, factors, shifts), forward, backward)


PAIRS = [(1, 5), (5, 1), (2, 3), (4, 12), (9, 3), (7, 6), (6, 7)]


@pytest.mark.parametrize(
    "mode, align_corners", [("bilinear", False), ("bilinear", True), ("avg", False), ("nearest", False)]
)
def sweep_taps(ops, mode, align_corners):
    """Sizes that fall between, on and beside the taps, forward and transposed: every pair of PAIRS along both axes."""
    one, zero = torch.ones(1), torch.zeros(1)
    for (h, out_h), (w, out_w) in zip(PAIRS, PAIRS[::-1], strict=True):
        x = torch.randn(1, 1, h, w, requires_grad=True)
        right = transfer(x, (out_h, out_w), mode, align_corners)
        found = ops.affine_scale_transfer.forward(
            x.detach(), one, zero, "none", (out_h, out_w), mode, align_corners, *NO_SCALE
        )
        torch.testing.assert_close(found, right.detach(), rtol=1e-5, atol=1e-5)
        gradient = torch.randn_like(right)
        (right,) = torch.autograd.grad(right, x, gradient)
        found, *_ = ops.affine_scale_transfer.backward(
            gradient, x.detach(), one, zero, "none", mode, align_corners, *NO_SCALE
        )
        torch.testing.assert_close(found, right, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("scale", [(1.7, 2.3), (0.6, 0.45), (3.0, 1.3)], ids=str)
def sweep_scale_factors(ops, mode, scale):
    """A scale factor that is not the ratio of the sizes sets the step."""
    x = torch.randn(1, 2, 7, 9, requires_grad=True)
    size = (int(7 * scale[0]), int(9 * scale[1]))
    right = F.interpolate(x, scale_factor=scale, mode=mode)
    assert right.shape[2:] == size
    ones, zeros = torch.ones(2), torch.zeros(2)
    found = ops.affine_scale_transfer.forward(x.detach(), ones, zeros, "none", size, mode, False, *scale)
    torch.testing.assert_close(found, right.detach(), rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(right)
    (right,) = torch.autograd.grad(right, x, gradient)
    found, *_ = ops.affine_scale_transfer.backward(gradient, x.detach(), ones, zeros, "none", mode, False, *scale)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=2e-5)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [(2, 18, (7, 9), (1, 2, 3, 6)), (1, 136, (9, 8), (4,)), (1, 24, (12, 12), (1, 2, 5, 9))], ids=str
)
def sweep_gated_pyramid_pool(ops, case, dtype, last):
    batch, channels, hw, bins = case
    x = layout(parameter(batch, channels, *hw, dtype=dtype), last)
    rho = parameter(len(bins), channels, 1, 1, dtype=dtype, scale=channels**-0.5)
    bias = parameter(len(bins), dtype=dtype) if batch == 1 else None

    def formula(x, rho, bias):
        gate = F.conv2d(x, rho, bias).sigmoid()
        pooled = [F.adaptive_avg_pool2d(gate[:, k : k + 1] * x, b).flatten(2) for k, b in enumerate(bins)]
        return torch.cat(pooled, 2), gate

    def forward(x, rho, bias):
        return ops.gated_pyramid_pool.forward(x, rho, bias, bins)

    def backward(outputs, gradients):
        grads = ops.gated_pyramid_pool.backward(*gradients, x, outputs[1], rho, bins)
        assert grads[0].stride() == x.stride()
        return given_ones(grads, (x, rho, bias))

    compare(formula, (x, rho, bias), forward, backward, [True, batch == 1])


def _call_everything(ops, x, rho, weight, dy, dz, pyramid_rho):
    """All operators, forward and backward, as one list of results."""
    stats = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(1))
    out, gate = ops.gated_scale_transfer.forward(x, rho, None, weight, None, "none", (3, 4), "avg", False, *NO_SCALE)
    results = [out, gate]
    results += ops.gated_scale_transfer.backward(
        dy, gate[:, :, :1].expand_as(gate), x, gate, rho, weight, None, "none", "avg", False, *NO_SCALE
    )
    out, _ = ops.gated_scale_transfer.forward(x, rho, None, weight, None, "relu", (3, 4), "nearest", False, *NO_SCALE)
    results += [out]
    results += ops.gated_scale_transfer.backward(
        dy, None, x, gate, rho, weight, None, "relu", "nearest", False, *NO_SCALE
    )
    z, gate, mean, var = ops.gated_projection.forward(x, rho, None, weight)
    results += [z, mean, var]
    results += ops.gated_projection.backward(dz, None, stats, stats, x, gate, rho, weight, z, mean)
    scale = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(2))
    results += [ops.affine_scale_transfer.forward(x, scale, scale, "relu", (5, 7), "bilinear", True, *NO_SCALE)]
    results += ops.affine_scale_transfer.backward(
        dz[:, : x.shape[1]], x, scale, scale, "relu", "bilinear", False, *NO_SCALE
    )
    pooled, gate = ops.gated_pyramid_pool.forward(x, pyramid_rho, None, (1, 3))
    results += [pooled, gate]
    results += ops.gated_pyramid_pool.backward(pooled, None, x, gate, pyramid_rho, (1, 3))
    return results


@layouts
def sweep_any_strides(ops, last):
    """Sliced, offset, transposed and expanded operands give what their dense copies give."""
    wide = layout(torch.randn(2, 20, 5, 7), last)
    rho, weight = torch.randn(1, 36, 1, 1)[:, ::2] / 4, (torch.randn(18, 24, 1, 1) / 4).transpose(0, 1)
    pyramid_rho = torch.randn(36, 2, 1, 1).transpose(0, 1)[:, ::2] / 4
    for x in (wide[:, 2:, 1:, :6], wide[:1, :18].expand(2, -1, -1, -1).transpose(2, 3)):
        dy, dz = torch.randn(()).expand(2, 24, 3, 4), torch.randn(2, 24, *x.shape[2:][::-1]).transpose(2, 3)
        found = _call_everything(ops, x, rho, weight, dy, dz, pyramid_rho)
        dense = layout(x, x.stride(1) == 1 and x.stride(3) > 1)
        right = _call_everything(ops, dense, *(t.contiguous() for t in (rho, weight, dy, dz, pyramid_rho)))
        for a, b in zip(found, right, strict=True):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@layouts
def sweep_wide_offsets(ops, monkeypatch, last):
    """With 64-bit offsets inside images, to the bit the same."""
    from gsto_ops.triton import gate, product, pyramid, pyramid_backward, resample

    x = layout(torch.randn(1, 18, 6, 5), last)
    operands = (x, torch.randn(1, 18, 1, 1), torch.randn(24, 18, 1, 1), torch.randn(1, 24, 3, 4))
    operands = (*operands, torch.randn(1, 24, 6, 5), torch.randn(2, 18, 1, 1))
    narrow = _call_everything(ops, *operands)
    for module in (gate, product, pyramid, pyramid_backward, resample):
        monkeypatch.setattr(module, "is_wide", lambda *maps: True)
    for a, b in zip(_call_everything(ops, *operands), narrow, strict=True):
        assert torch.equal(a, b)


def sweep_wide_is_chosen_by_size(ops):
    from gsto_ops.triton.launch import is_wide, resampling

    assert not is_wide(torch.empty(4, 2, 1 << 15, (1 << 15) - 1, device="meta"))
    assert is_wide(torch.empty(1, 3, 1 << 15, 1 << 15, device="meta"))
    assert is_wide(torch.empty(1, 3, 1 << 15, 1 << 15, device="meta", memory_format=torch.channels_last))
    assert resampling((1, 1 << 17), (1, 1 << 15), "avg", False, None, None).wide
    assert not resampling((512, 1024), (256, 512), "avg", False, None, None).wide


@layouts
def sweep_empty_batch(ops, last):
    x, gate = layout(torch.randn(0, 18, 6, 6), last), torch.randn(0, 1, 6, 6)
    rho, weight, bias = torch.randn(1, 18, 1, 1), torch.randn(36, 18, 1, 1), torch.randn(36)
    for mode, size, activation in (("bilinear", (12, 12), "none"), ("avg", (3, 3), "none"), ("avg", (6, 6), "relu")):
        out, _ = ops.gated_scale_transfer.forward(x, rho, None, weight, bias, activation, size, mode, False, *NO_SCALE)
        assert out.shape == (0, 36, *size)
        grads = ops.gated_scale_transfer.backward(
            out, None, x, gate, rho, weight, bias, activation, mode, False, *NO_SCALE
        )
        assert grads[0].shape == x.shape and all((g == 0).all() for g in grads)
    z, _, mean, var = ops.gated_projection.forward(x, rho, None, weight)
    assert z.shape == (0, 36, 6, 6) and mean.isnan().all() and var.isnan().all()
    grads = ops.gated_projection.backward(z, None, mean, var, x, gate, rho, weight, z, mean)
    assert all((g == 0).all() for g in grads)
    grads = ops.affine_scale_transfer.backward(x, x, bias[:18], bias[:18], "relu", "avg", False, *NO_SCALE)
    assert all((g == 0).all() for g in grads)
    pooled, gates = ops.gated_pyramid_pool.forward(x, weight[:2], None, (1, 2))
    assert pooled.shape == (0, 18, 5)
    assert all((g == 0).all() for g in ops.gated_pyramid_pool.backward(pooled, None, x, gates, weight[:2], (1, 2)))


@layouts
def sweep_chunks_of_images(ops, monkeypatch, last):
    """Images taken a few at a time give what all at once give."""
    from gsto_ops.triton import launch

    x, rho = layout(torch.randn(3, 18, 8, 9), last), torch.randn(2, 18, 1, 1)
    weight = torch.randn(20, 18, 1, 1)

    def results():
        found = list(ops.gated_pyramid_pool.forward(x, rho, None, (1, 2)))
        for mode, size in (("nearest", (9, 11)), ("bilinear", (4, 4)), ("avg", (1, 1))):
            found += ops.gated_scale_transfer.forward(
                x, rho[:1], None, weight, None, "none", size, mode, False, *NO_SCALE
            )
        return found

    right = results()
    monkeypatch.setattr(launch, "CHUNK_BYTES", 2 * 4 * 8 * 9 * 18)
    for a, b in zip(results(), right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def sweep_nan_passes_relu(ops):
    x = torch.randn(1, 4, 2, 2)
    x[0, 1, 1, 1] = float("nan")
    out = ops.affine_scale_transfer.forward(x, torch.ones(4), torch.zeros(4), "relu", (2, 2), "avg", False, *NO_SCALE)
    assert torch.equal(out.isnan(), x.isnan())
