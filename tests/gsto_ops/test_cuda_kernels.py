"""The CUDA kernels, run by the emulator on the CPU and on a GPU where there is one, against float64 autograd of the formulas.

The emulator compiles the sources that nvcc compiles; memory that they have not written holds NaN.
"""

import pytest
import torch
import torch.nn.functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TINY = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
aten = torch.ops.aten


@pytest.fixture
def ops(cuda_operators):
    return cuda_operators


def layout(tensor, channels_last):
    if tensor is None or tensor.dim() != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def transfer(x, size, mode, align_corners=False, scale=None):
    scale_h, scale_w = scale or (None, None)
    if mode == "avg":
        return F.adaptive_avg_pool2d(x, size)
    if mode == "bilinear":
        return aten.upsample_bilinear2d(x, size, align_corners, scale_h, scale_w)
    return aten.upsample_nearest2d(x, size, scale_h, scale_w)


def act(x, activation):
    return x.relu() if activation == "relu" else x


def assert_close(found, exact, eager, name, dtype, usual=0.05):
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


def compare(formula, operands, forward, backward, seeds=None):
    """``formula`` in float64 and in the operands' dtype against the operator, outputs and gradients.

    ``forward(*operands)`` returns the operator's outputs, ``backward(outputs, output gradients)`` its gradients for all operands
    that are not None. ``seeds``: which outputs have a gradient.
    """
    runs = []
    gradients = None
    for dtype in (torch.float64, None):
        leaves = [o if o is None else o.detach().to(dtype or o.dtype).requires_grad_() for o in operands]
        outputs = formula(*leaves)
        if gradients is None:
            gradients = [torch.randn(o.shape, dtype=torch.float64) for o in outputs]
            seeds = seeds or [True] * len(outputs)
        pairs = [(o, g.to(o.dtype)) for o, g, wanted in zip(outputs, gradients, seeds, strict=True) if wanted]
        found = torch.autograd.grad(
            [o for o, _ in pairs], [leaf for leaf in leaves if leaf is not None], [g for _, g in pairs]
        )
        runs.append((outputs, found))
    (exact, exact_grads), (eager, eager_grads) = runs
    outputs = forward(*operands)
    dtype = operands[0].dtype
    for i, found in enumerate(outputs):
        assert_close(found, exact[i].detach(), eager[i].detach(), f"output {i}", dtype, 0.05 if i < 2 else 0.5)
    given = [g.to(o.dtype) if wanted else None for g, o, wanted in zip(gradients, outputs, seeds, strict=True)]
    for i, (found, right, plain) in enumerate(zip(backward(outputs, given), exact_grads, eager_grads, strict=True)):
        # A parameter's gradient is a sum over pixels, whose terms may cancel.
        pixels = operands[0].numel() // operands[0].shape[1]
        assert_close(found, right, plain, f"gradient {i}", dtype, 0.05 if i == 0 else 0.5 * pixels**0.5)
    return outputs


def parameter(*shape, dtype, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


# batch, channels, out_channels (None: no projection), size, new size, mode, align_corners, scale, activation
TRANSFERS = [
    (2, 18, 36, (9, 13), (18, 26), "bilinear", False, None, "none"),
    (1, 36, 18, (5, 6), (40, 48), "bilinear", False, (8.0, 8.0), "relu"),
    (2, 16, 48, (9, 7), (13, 20), "bilinear", True, None, "none"),
    (1, 130, 70, (6, 11), (4, 5), "bilinear", False, None, "none"),
    (3, 24, 40, (12, 16), (6, 8), "avg", False, None, "none"),
    (1, 18, 36, (9, 13), (4, 6), "avg", False, None, "relu"),
    (1, 18, 130, (21, 22), (2, 1), "avg", False, None, "none"),
    (2, 1, 3, (5, 5), (10, 10), "nearest", False, None, "none"),
    (1, 36, 20, (9, 16), (3, 4), "nearest", False, (0.4, 0.3), "none"),
    (1, 64, 64, (8, 8), (8, 8), "bilinear", False, None, "relu"),
    (2, 18, 19, (5, 9), (5, 9), "avg", False, None, "none"),
    (1, 16, None, (7, 8), (14, 16), "bilinear", False, None, "relu"),
    (2, 18, None, (9, 13), (4, 6), "avg", False, None, "none"),
    (1, 40, None, (8, 16), (8, 16), "bilinear", False, None, "relu"),
    (1, 8, None, (24, 24), (2, 2), "avg", False, None, "none"),
    (1, 8, None, (6, 24), (12, 5), "bilinear", False, None, "none"),
    (0, 18, 36, (6, 6), (12, 12), "bilinear", False, None, "none"),
    (1, 200, 24, (5, 13), (10, 26), "bilinear", False, None, "none"),
    (1, 4, 3, (96, 96), (1, 1), "bilinear", False, None, "none"),  # too many gates for shared memory: two readings
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRANSFERS, ids=str)
def test_gated_scale_transfer(ops, case, dtype, channels_last):
    batch, channels, out_channels, hw, size, mode, align_corners, scale, activation = case
    x = layout(parameter(batch, channels, *hw, dtype=dtype), channels_last)
    rho = parameter(1, channels, 1, 1, dtype=dtype, scale=channels**-0.5)
    bias = parameter(1, dtype=dtype) if out_channels is None or out_channels % 2 == 0 else None
    weight = (
        None if out_channels is None else parameter(out_channels, channels, 1, 1, dtype=dtype, scale=channels**-0.5)
    )
    shift = parameter(out_channels, dtype=dtype) if out_channels is not None and channels % 4 == 2 else None
    scales = scale or (None, None)

    def formula(x, rho, bias, weight, shift):
        gate = F.conv2d(x, rho, bias).sigmoid()
        z = gate * x
        if weight is not None:
            z = F.conv2d(z, weight, shift)
        return transfer(act(z, activation), size, mode, align_corners, scale), gate

    def forward(x, rho, bias, weight, shift):
        return ops.gated_scale_transfer(x, rho, bias, weight, shift, activation, size, mode, align_corners, *scales)

    def backward(outputs, gradients):
        gradient = layout(gradients[0], channels_last)
        grads = ops.gated_scale_transfer_backward(
            gradient, gradients[1], x, outputs[1], rho, weight, shift, activation, mode, align_corners, *scales
        )
        assert grads[0].stride() == x.stride()
        return [g for g, o in zip(grads, (x, rho, bias, weight, shift), strict=True) if o is not None]

    if batch == 0:
        output, _ = forward(x, rho, bias, weight, shift)
        grads = backward((output, output.new_empty(0, 1, *hw)), (output, None))
        assert output.shape == (0, out_channels, *size)
        assert all((g == 0).all() for g in grads)
        return
    with_gate = mode != "avg"  # whether the gate's own gradient takes part
    outputs = compare(formula, (x, rho, bias, weight, shift), forward, backward, [True, with_gate])
    wanted = torch.channels_last if x.stride(1) == 1 and x.stride(3) > 1 else torch.contiguous_format
    assert outputs[0].stride() == outputs[0].contiguous(memory_format=wanted).stride()
    assert outputs[1].is_contiguous()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [(2, 18, 36, 9, 13), (1, 64, 70, 8, 16), (3, 130, 5, 4, 3), (1, 200, 16, 8, 8), (2, 16, 1, 1, 5)], ids=str
)
@pytest.mark.parametrize("seeds", [(True, False, False, False), (True, True, True, True)], ids=["plain", "statistics"])
def test_gated_projection(ops, case, dtype, channels_last, seeds):
    batch, channels, out_channels, *hw = case
    x = layout(parameter(batch, channels, *hw, dtype=dtype), channels_last)
    rho = parameter(1, channels, 1, 1, dtype=dtype, scale=channels**-0.5)
    bias = parameter(1, dtype=dtype) if batch == 1 else None
    weight = parameter(out_channels, channels, 1, 1, dtype=dtype, scale=channels**-0.5)

    def formula(x, rho, bias, weight):
        gate = F.conv2d(x, rho, bias).sigmoid()
        z = F.conv2d(gate * x, weight)
        wide = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        return z, gate, wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)

    def backward(outputs, gradients):
        dz, dgate, dmean, dvar = gradients
        dz = layout(dz, channels_last)
        output, gate, mean, _ = outputs
        grads = ops.gated_projection_backward(dz, dgate, dmean, dvar, x, gate, rho, weight, output, mean)
        return [g for g, o in zip(grads, (x, rho, bias, weight), strict=True) if o is not None]

    outputs = compare(formula, (x, rho, bias, weight), ops.gated_projection, backward, seeds)
    assert outputs[2].dtype == outputs[3].dtype == torch.float32


def test_statistics_survive_a_large_mean(ops):
    """Sums of squares would lose a variance that is 1e-8 of the squared mean; merged partial variances do not."""
    x = 100 + torch.randn(4, 8, 16, 16) * 0.01
    weight = torch.eye(8)[:, :, None, None]
    _, _, mean, var = ops.gated_projection(x, torch.zeros(1, 8, 1, 1), torch.full((1,), 40.0), weight)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), unbiased=False), rtol=1e-2, atol=0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        (2, 18, (9, 13), (18, 26), "bilinear", False, None, "relu"),
        (1, 130, (4, 5), (9, 9), "bilinear", True, None, "none"),
        (3, 24, (12, 16), (5, 8), "avg", False, None, "relu"),
        (1, 1, (5, 6), (10, 12), "nearest", False, (2.0, 2.0), "relu"),
        (2, 16, (7, 9), (7, 9), "bilinear", False, None, "relu"),
    ],
    ids=str,
)
def test_affine_scale_transfer(ops, case, dtype, channels_last):
    batch, channels, hw, size, mode, align_corners, scale, activation = case
    x = layout(parameter(batch, channels, *hw, dtype=dtype), channels_last)
    factors, shifts = torch.randn(channels), torch.randn(channels)
    scales = scale or (None, None)

    def formula(x, factors, shifts):
        z = act(factors[:, None, None] * x + shifts[:, None, None], activation).to(x.dtype)
        return (transfer(z, size, mode, align_corners, scale),)

    def forward(x, factors, shifts):
        return (ops.affine_scale_transfer(x, factors, shifts, activation, size, mode, align_corners, *scales),)

    def backward(outputs, gradients):
        gradient = layout(gradients[0], channels_last)
        return ops.affine_scale_transfer_backward(
            gradient, x, factors, shifts, activation, mode, align_corners, *scales
        )

    compare(formula, (x, factors, shifts), forward, backward)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [(2, 18, (13, 17), (1, 2, 3, 6)), (1, 136, (9, 8), (4,)), (1, 24, (12, 12), (1, 2, 3, 5, 6, 20))], ids=str
)
def test_gated_pyramid_pool(ops, case, dtype, channels_last):
    batch, channels, hw, bins = case
    x = layout(parameter(batch, channels, *hw, dtype=dtype), channels_last)
    rho = parameter(len(bins), channels, 1, 1, dtype=dtype, scale=channels**-0.5)
    bias = parameter(len(bins), dtype=dtype) if batch == 1 else None

    def formula(x, rho, bias):
        gate = F.conv2d(x, rho, bias).sigmoid()
        pooled = [F.adaptive_avg_pool2d(gate[:, k : k + 1] * x, b).flatten(2) for k, b in enumerate(bins)]
        return torch.cat(pooled, 2), gate

    def forward(x, rho, bias):
        return ops.gated_pyramid_pool(x, rho, bias, bins)

    def backward(outputs, gradients):
        grads = ops.gated_pyramid_pool_backward(gradients[0], gradients[1], x, outputs[1], rho, bins)
        return [g for g, o in zip(grads, (x, rho, bias), strict=True) if o is not None]

    compare(formula, (x, rho, bias), forward, backward, [True, batch == 1])


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_tf32(ops, channels_last):
    """Allowed: products round their operands to 10 bits. Not allowed: they are exact to float32."""
    x = layout(torch.randn(1, 40, 9, 9), channels_last)
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


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_any_strides(ops, channels_last):
    """Sliced, offset and expanded operands give what their dense copies give, to the bit."""
    wide = layout(torch.randn(2, 20, 9, 16), channels_last)
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
