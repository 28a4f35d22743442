"""Every Triton kernel, run by Triton's interpreter on the CPU, against float64 autograd of the plain formulas.

The interpreter is chosen when triton is imported, so the sweep (the functions called sweep_*) runs in a process of its own, in
which memory that no kernel has written holds NaN.
"""

import importlib
from types import SimpleNamespace

import gated_kernels
import interpreted
import pytest
import torch
import torch.nn.functional as F
from gated_kernels import DTYPES, NO_SCALE, every_seed, layout, layouts, transfer

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


def assert_close(found, exact, eager, name, dtype, usual):
    interpreted.assert_close(found, exact, eager, name, interpreted.TINY[dtype], usual)


def test_every_kernel_in_the_interpreter():
    interpreted.run_sweeps(__file__, at_least=100)


@pytest.fixture(scope="module")
def ops():
    interpreted.prepare()
    names = ("affine_scale_transfer", "gated_projection", "gated_pyramid_pool", "gated_scale_transfer")
    modules = {name: importlib.import_module(f"gsto_ops.triton.{name}") for name in names}
    forward = {name: module.forward for name, module in modules.items()}
    return SimpleNamespace(**forward, **{f"{name}_backward": module.backward for name, module in modules.items()})


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
    gated_kernels.check_gated_scale_transfer(ops, assert_close, case, dtype, last)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(2, 18, 36, 5, 7), (1, 64, 70, 8, 16), (3, 130, 5, 4, 3), (2, 1, 1, 1, 5)], ids=str)
@every_seed
def sweep_gated_projection(ops, case, dtype, last, seeds):
    gated_kernels.check_gated_projection(ops, assert_close, case, dtype, last, seeds)


def sweep_statistics_survive_a_large_mean(ops, monkeypatch):
    from gsto_ops.triton import reduce

    monkeypatch.setattr(reduce, "ROWS", 4)  # several levels for few tiles
    gated_kernels.check_statistics_of_a_large_mean(ops)


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
    gated_kernels.check_affine_scale_transfer(ops, assert_close, case, dtype, last)


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
        found = ops.affine_scale_transfer(x.detach(), one, zero, "none", (out_h, out_w), mode, align_corners, *NO_SCALE)
        torch.testing.assert_close(found, right.detach(), rtol=1e-5, atol=1e-5)
        gradient = torch.randn_like(right)
        (right,) = torch.autograd.grad(right, x, gradient)
        found, *_ = ops.affine_scale_transfer_backward(
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
    found = ops.affine_scale_transfer(x.detach(), ones, zeros, "none", size, mode, False, *scale)
    torch.testing.assert_close(found, right.detach(), rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(right)
    (right,) = torch.autograd.grad(right, x, gradient)
    found, *_ = ops.affine_scale_transfer_backward(gradient, x.detach(), ones, zeros, "none", mode, False, *scale)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=2e-5)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [(2, 18, (7, 9), (1, 2, 3, 6)), (1, 136, (9, 8), (4,)), (1, 24, (12, 12), (1, 2, 5, 9))], ids=str
)
def sweep_gated_pyramid_pool(ops, case, dtype, last):
    gated_kernels.check_gated_pyramid_pool(ops, assert_close, case, dtype, last)


def _call_everything(ops, x, rho, weight, dy, dz, pyramid_rho):
    """All operators, forward and backward, as one list of results."""
    stats = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(1))
    out, gate = ops.gated_scale_transfer(x, rho, None, weight, None, "none", (3, 4), "avg", False, *NO_SCALE)
    results = [out, gate]
    results += ops.gated_scale_transfer_backward(
        dy, gate[:, :, :1].expand_as(gate), x, gate, rho, weight, None, "none", "avg", False, *NO_SCALE
    )
    out, _ = ops.gated_scale_transfer(x, rho, None, weight, None, "relu", (3, 4), "nearest", False, *NO_SCALE)
    results += [out]
    results += ops.gated_scale_transfer_backward(
        dy, None, x, gate, rho, weight, None, "relu", "nearest", False, *NO_SCALE
    )
    z, gate, mean, var = ops.gated_projection(x, rho, None, weight)
    results += [z, mean, var]
    results += ops.gated_projection_backward(dz, None, stats, stats, x, gate, rho, weight, z, mean)
    scale = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(2))
    results += [ops.affine_scale_transfer(x, scale, scale, "relu", (5, 7), "bilinear", True, *NO_SCALE)]
    results += ops.affine_scale_transfer_backward(
        dz[:, : x.shape[1]], x, scale, scale, "relu", "bilinear", False, *NO_SCALE
    )
    pooled, gate = ops.gated_pyramid_pool(x, pyramid_rho, None, (1, 3))
    results += [pooled, gate]
    results += ops.gated_pyramid_pool_backward(pooled, None, x, gate, pyramid_rho, (1, 3))
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def sweep_empty_batch(ops, dtype, last):
    gated_kernels.check_empty_batch(ops, dtype, last)


@layouts
def sweep_chunks_of_images(ops, monkeypatch, last):
    """Images taken a few at a time give what all at once give."""
    from gsto_ops.triton import launch

    x, rho = layout(torch.randn(3, 18, 8, 9), last), torch.randn(2, 18, 1, 1)
    weight = torch.randn(20, 18, 1, 1)

    def results():
        found = list(ops.gated_pyramid_pool(x, rho, None, (1, 2)))
        for mode, size in (("nearest", (9, 11)), ("bilinear", (4, 4)), ("avg", (1, 1))):
            found += ops.gated_scale_transfer(x, rho[:1], None, weight, None, "none", size, mode, False, *NO_SCALE)
        return found

    right = results()
    monkeypatch.setattr(launch, "CHUNK_BYTES", 2 * 4 * 8 * 9 * 18)
    for a, b in zip(results(), right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def sweep_nan_passes_relu(ops):
    x = torch.randn(1, 4, 2, 2)
    x[0, 1, 1, 1] = float("nan")
    out = ops.affine_scale_transfer(x, torch.ones(4), torch.zeros(4), "relu", (2, 2), "avg", False, *NO_SCALE)
    assert torch.equal(out.isnan(), x.isnan())
