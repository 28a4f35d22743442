"""Every operator on every native backend against float64: dtypes, layouts, views, odd sizes and channels, absent operands.

The bound is twice the error of plain PyTorch in the same dtype on the same device, plus a few units in the last place of the
largest value. The GPU backends are marked ``gpu``; ``cpu`` runs everywhere.
"""

import pytest
import torch

import gsto_ops
from gsto_ops import reference

PLACES = [
    pytest.param("cpu", "cpu"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NCHW, NHWC = torch.contiguous_format, torch.channels_last
LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "nhwc": lambda x: x.contiguous(memory_format=NHWC),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "sliced nhwc": lambda x: torch.cat([x, x], 1).contiguous(memory_format=NHWC)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
# (N, C, H, W), C', (H', W'): up, down, identity, mixed, odd, pixels of one, a batch of none
SHAPES = [
    ((2, 96, 16, 32), 48, (32, 64)),
    ((1, 48, 32, 48), 96, (16, 24)),
    ((3, 18, 9, 13), 36, (9, 13)),
    ((1, 36, 7, 5), 18, (28, 20)),
    ((2, 130, 11, 6), 33, (4, 9)),
    ((1, 1, 5, 3), 1, (2, 7)),
    ((2, 17, 1, 1), 5, (1, 1)),
    ((0, 18, 6, 6), 36, (3, 3)),
]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend, device", PLACES)


def run(function, operands, seeds):
    """Outputs and gradients of ``function``, the output gradients being ``seeds`` in the outputs' dtypes."""
    outputs = function(*operands)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, operands, [s.to(o.dtype) for s, o in zip(seeds, outputs, strict=True)])
    return [*outputs, *grads]


def check(backend, function, plain, operands, layout, dtype, keep_wide=()):
    """``function`` on this backend against ``plain``, the same in plain PyTorch, in float64 and in ``dtype``."""
    if backend not in gsto_ops.available_backends():
        pytest.skip(f"backend {backend!r} is not available: {gsto_ops.backends.why_not(backend)}")

    def cast(to):
        wide = torch.promote_types(to, torch.float32)
        tensors = [o.detach().to(wide if i in keep_wide else to) for i, o in enumerate(operands)]
        return [LAYOUTS[layout](tensors[0]).requires_grad_(), *(t.requires_grad_() for t in tensors[1:])]

    operands = cast(dtype)  # the same rounded numbers for all three
    with torch.no_grad():
        shapes = plain(*cast(torch.float64))
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    pixels = operands[0].numel() // operands[0].shape[1]
    seeds = [torch.randn(s.shape, device=s.device).to(dtype).double() for s in shapes]
    exact = run(plain, cast(torch.float64), seeds)
    same_dtype = run(plain, cast(dtype), seeds)
    with gsto_ops.use_backend(backend):
        ours = run(function, cast(dtype), seeds)
        again = run(function, cast(dtype), seeds)
    for i, (o, a, p, e) in enumerate(zip(ours, again, same_dtype, exact, strict=True)):
        assert o.shape == e.shape
        assert torch.equal(o, a), f"result {i} is not deterministic"
        if e.numel() == 0:
            continue
        error, allowed = (o.double() - e).abs().max(), (p.double() - e).abs().max()
        # Parameter gradients are sums over all pixels, whose rounding errors do not cancel where the sum does.
        summed = pixels**0.5 if i > len(seeds) else 0
        slack = 8 * torch.finfo(dtype).eps * (e.abs().max() + summed)
        assert error <= 2 * allowed + slack, (
            f"result {i}: error {error:.3e}, plain PyTorch {allowed:.3e}, slack {slack:.3e}"
        )


def make(device, *shape, spread=1.0):
    return torch.randn(*shape, dtype=torch.float64, device=device) * spread


def gate_operands(device, shape, rows=1):
    channels = shape[1]
    return make(device, *shape), make(device, rows, channels, 1, 1, spread=channels**-0.5), make(device, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, out_channels, size", SHAPES)
@pytest.mark.parametrize(
    "mode, activation", [("bilinear", "none"), ("avg", "none"), ("nearest", "relu"), ("bilinear", "relu")]
)
def test_gated_scale_transfer(backend, device, shape, out_channels, size, mode, activation, layout, dtype):
    x, rho, b = gate_operands(device, shape)
    w, c = make(device, out_channels, shape[1], 1, 1, spread=shape[1] ** -0.5), make(device, out_channels)
    act = None if activation == "none" else activation
    check(
        backend,
        lambda *t: gsto_ops.gated_scale_transfer(*t, activation=act, size=size, mode=mode, return_gate=True),
        lambda *t: reference.gated_scale_transfer(*t, activation, size, mode),
        (x, rho, b, w, c),
        layout,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape, out_channels, size", SHAPES)
@pytest.mark.parametrize("mode, align_corners", [("bilinear", True), ("avg", False)])
def test_gate_without_projection(backend, device, shape, out_channels, size, mode, align_corners, layout, dtype):
    x, rho, _ = gate_operands(device, shape)
    check(
        backend,
        lambda x, rho: gsto_ops.gated_scale_transfer(
            x, rho, size=size, mode=mode, align_corners=align_corners, return_gate=True
        ),
        lambda x, rho: reference.gated_scale_transfer(x, rho, None, None, None, "none", size, mode, align_corners),
        (x, rho),
        layout,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, out_channels, size", SHAPES[:-2])
def test_gated_projection(backend, device, shape, out_channels, size, layout, dtype):
    x, rho, b = gate_operands(device, shape)
    w = make(device, out_channels, shape[1], 1, 1, spread=shape[1] ** -0.5)
    check(backend, gsto_ops.gated_projection, reference.gated_projection, (x, rho, b, w), layout, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, out_channels, size", SHAPES)
@pytest.mark.parametrize("mode, activation", [("bilinear", "relu"), ("avg", "relu"), ("nearest", "none")])
def test_affine_scale_transfer(backend, device, shape, out_channels, size, mode, activation, layout, dtype):
    act = None if activation == "none" else activation
    check(
        backend,
        lambda *t: gsto_ops.affine_scale_transfer(*t, activation=act, size=size, mode=mode),
        lambda *t: reference.affine_scale_transfer(*t, activation, size, mode),
        (make(device, *shape), make(device, shape[1]), make(device, shape[1])),
        layout,
        dtype,
        keep_wide=(1, 2),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
@pytest.mark.parametrize("shape", [(2, 64, 16, 24), (1, 130, 11, 7), (3, 18, 5, 6), (0, 18, 6, 6)])
def test_gated_pyramid_pool(backend, device, shape, layout, dtype):
    bins = [1, 2, 3, 6]
    x, rho, b = gate_operands(device, shape, rows=len(bins))

    def flat(*t):
        pooled, gate = gsto_ops.gated_pyramid_pool(*t, bins=bins)
        return torch.cat([cells.flatten(2) for cells in pooled], 2), gate

    check(backend, flat, lambda *t: reference.gated_pyramid_pool(*t, bins), (x, rho, b), layout, dtype)
