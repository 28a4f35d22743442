"""The CUDA kernels, run by the emulator on the CPU and on a GPU where there is one, against float64 autograd of the formulas.

The emulator compiles the sources that nvcc compiles; memory that they have not written holds NaN.
"""

import gated_kernels
import pytest
import torch
import torch.nn.functional as F
from gated_kernels import DTYPES, NO_SCALE, every_seed, layout, layouts

TINY = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture
def ops(cuda_operators):
    return cuda_operators


def assert_close(found, exact, eager, name, dtype, usual):
    """Within twice the error of PyTorch in the same dtype, and a few roundings, relative to the exact or a usual magnitude.

    float32: the largest error. 16 bits: the root mean square, because a ReLU that rounding switches over is no error.
    """
    assert found.shape == exact.shape, f"{name}: shape {tuple(found.shape)}, not {tuple(exact.shape)}"
    assert found.isfinite().all(), f"{name}: not finite"

    def magnitude(tensor):
        tensor = tensor.double()
        return (tensor.abs().max() if dtype == torch.float32 else tensor.square().mean().sqrt()).item()

    unit = max(magnitude(exact), usual)
    error = magnitude(found.double() - exact) / unit
    allowed = 2 * magnitude(eager.double() - exact) / unit + TINY[dtype]
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


# batch, channels, out_channels (None: no projection), size, new size, mode, align_corners, scale, activation
TRANSFERS = [
    (2, 18, 36, (9, 13), (18, 26), "bilinear", False, NO_SCALE, "none"),
    (1, 36, 18, (5, 6), (40, 48), "bilinear", False, (8.0, 8.0), "relu"),
    (2, 16, 48, (9, 7), (13, 20), "bilinear", True, NO_SCALE, "none"),
    (1, 130, 70, (6, 11), (4, 5), "bilinear", False, NO_SCALE, "none"),
    (3, 24, 40, (12, 16), (6, 8), "avg", False, NO_SCALE, "none"),
    (1, 18, 36, (9, 13), (4, 6), "avg", False, NO_SCALE, "relu"),
    (1, 18, 130, (21, 22), (2, 1), "avg", False, NO_SCALE, "none"),
    (2, 1, 3, (5, 5), (10, 10), "nearest", False, NO_SCALE, "none"),
    (1, 36, 20, (9, 16), (3, 4), "nearest", False, (0.4, 0.3), "none"),
    (1, 64, 64, (8, 8), (8, 8), "bilinear", False, NO_SCALE, "relu"),
    (2, 18, 19, (5, 9), (5, 9), "avg", False, NO_SCALE, "none"),
    (1, 16, None, (7, 8), (14, 16), "bilinear", False, NO_SCALE, "relu"),
    (2, 18, None, (9, 13), (4, 6), "avg", False, NO_SCALE, "none"),
    (1, 40, None, (8, 16), (8, 16), "bilinear", False, NO_SCALE, "relu"),
    (1, 8, None, (24, 24), (2, 2), "avg", False, NO_SCALE, "none"),
    (1, 8, None, (6, 24), (12, 5), "bilinear", False, NO_SCALE, "none"),
    (1, 200, 24, (5, 13), (10, 26), "bilinear", False, NO_SCALE, "none"),
    (1, 4, 3, (96, 96), (1, 1), "bilinear", False, NO_SCALE, "none"),  # too many gates for shared memory: two readings
]


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRANSFERS, ids=str)
def test_gated_scale_transfer(ops, case, dtype, last):
    gated_kernels.check_gated_scale_transfer(ops, assert_close, case, dtype, last)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [(2, 18, 36, 9, 13), (1, 64, 70, 8, 16), (3, 130, 5, 4, 3), (1, 200, 16, 8, 8), (2, 16, 1, 1, 5)], ids=str
)
@every_seed
def test_gated_projection(ops, case, dtype, last, seeds):
    gated_kernels.check_gated_projection(ops, assert_close, case, dtype, last, seeds)


def test_statistics_survive_a_large_mean(ops):
    gated_kernels.check_statistics_of_a_large_mean(ops)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        (2, 18, (9, 13), (18, 26), "bilinear", False, NO_SCALE, "relu"),
        (1, 130, (4, 5), (9, 9), "bilinear", True, NO_SCALE, "none"),
        (3, 24, (12, 16), (5, 8), "avg", False, NO_SCALE, "relu"),
        (1, 1, (5, 6), (10, 12), "nearest", False, (2.0, 2.0), "relu"),
        (2, 16, (7, 9), (7, 9), "bilinear", False, NO_SCALE, "relu"),
    ],
    ids=str,
)
def test_affine_scale_transfer(ops, case, dtype, last):
    gated_kernels.check_affine_scale_transfer(ops, assert_close, case, dtype, last)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [(2, 18, (13, 17), (1, 2, 3, 6)), (1, 136, (9, 8), (4,)), (1, 24, (12, 12), (1, 2, 3, 5, 6, 20))], ids=str
)
def test_gated_pyramid_pool(ops, case, dtype, last):
    gated_kernels.check_gated_pyramid_pool(ops, assert_close, case, dtype, last)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(ops, dtype, last):
    gated_kernels.check_empty_batch(ops, dtype, last)


@layouts
def test_tf32(ops, last):
    """Allowed: products round their operands to 10 bits. Not allowed: they are exact to float32."""
    x = layout(torch.randn(1, 40, 9, 9), last)
    rho, weight = torch.randn(1, 40, 1, 1) / 6, torch.randn(70, 40, 1, 1) / 6
    gate = F.conv2d(x.double(), rho.double()).sigmoid()
    exact = F.conv2d(gate * x.double(), weight.double())
    errors = []
    for allow in (False, True):
        ops.set_allow_tf32(allow)
        found, found_gate = ops.gated_scale_transfer(
            x, rho, None, weight, None, "none", (9, 9), "avg", False, None, None
        )
        errors.append((found.double() - exact).abs().max().item())
        assert (found_gate.double() - gate).abs().max() < 1e-6  # the gate never uses TF32
    ops.set_allow_tf32(False)
    assert errors[0] < 3e-6 < 1e-5 < errors[1] < 5e-3


@layouts
def test_any_strides(ops, last):
    """Sliced, offset and expanded operands give what their dense copies give, to the bit."""
    wide = layout(torch.randn(2, 20, 9, 16), last)
    rho, weight = torch.randn(1, 36, 1, 1)[:, ::2] / 4, torch.randn(18, 24, 1, 1).transpose(0, 1)
    for x in (wide[:, 1:19], wide[:, 2:, 1:, :13], wide[:1, :18].expand(2, -1, -1, -1), wide[:, :18].transpose(2, 3)):
        gradient = torch.randn(()).expand(2, 24, 5, 8)
        results = []
        for view in (x, layout(x, x.stride(1) == 1)):
            w = weight if view is x else weight.contiguous()
            out, gate = ops.gated_scale_transfer(view, rho, None, w, None, "none", (5, 8), "avg", False, None, None)
            dy = gradient if view is x else gradient.contiguous()
            grads = ops.gated_scale_transfer_backward(
                dy, None, view, gate, rho, w, None, "none", "avg", False, None, None
            )
            results.append((out, gate, *grads))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_results_repeat_to_the_bit(ops):
    x, rho = torch.randn(2, 36, 12, 12).bfloat16(), torch.randn(1, 36, 1, 1).bfloat16()
    weight, dy = torch.randn(20, 36, 1, 1).bfloat16(), torch.randn(2, 20, 24, 24).bfloat16()
    _, gate = ops.gated_scale_transfer(x, rho, None, weight, None, "relu", (24, 24), "bilinear", False, None, None)
    runs = [
        ops.gated_scale_transfer_backward(dy, None, x, gate, rho, weight, None, "relu", "bilinear", False, None, None)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_bad_input_names_operator_and_shapes(ops):
    x, rho = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 1, 1)
    tail = ("none", (5, 5), "avg", False, None, None)
    with pytest.raises(
        RuntimeError, match=r"gated_scale_transfer: gate_weight must have shape \(1, 4, 1, 1\).*\(1, 3, 1, 1\)"
    ):
        ops.gated_scale_transfer(x, rho[:, :3], None, None, None, *tail)
    with pytest.raises(RuntimeError, match=r"gated_scale_transfer: input of shape \(1, 4, 5, 5\) has dtype Double"):
        ops.gated_scale_transfer(x.double(), rho.double(), None, None, None, *tail)
    with pytest.raises(RuntimeError, match="mode must be bilinear, avg or nearest, got bicubic"):
        ops.gated_scale_transfer(x, rho, None, None, None, "none", (5, 5), "bicubic", False, None, None)
    with pytest.raises(RuntimeError, match="activation must be none or relu, got gelu"):
        ops.gated_scale_transfer(x, rho, None, None, None, "gelu", *tail[1:])
    with pytest.raises(
        RuntimeError, match=r"gated_pyramid_pool: the bins cut input of shape \(1, 4, 300, 300\) into more than 128"
    ):
        ops.gated_pyramid_pool(torch.randn(1, 4, 300, 300), rho, None, [200])


def test_failed_launches_and_allocations_name_operator_and_shapes(ops):
    x, rho = torch.randn(1, 60000, 1, 1), torch.randn(1, 60000, 1, 1)
    with pytest.raises(RuntimeError, match=r"gated_pyramid_pool: the launch .* failed .* shape \(1, 60000, 1, 1\)"):
        ops.gated_pyramid_pool(x, rho, None, [1])  # 235 KiB of sums do not fit into shared memory
    x, rho = torch.randn(64, 256, 1, 1), torch.randn(1, 256, 1, 1)
    with pytest.raises(
        RuntimeError, match=r"gated_scale_transfer: allocating \(64, 256, 30000, 40000\) .* shape \(64, 256, 1, 1\)"
    ):
        ops.gated_scale_transfer(x, rho, None, None, None, "none", (30000, 40000), "nearest", False, None, None)
