"""Checks of the gated operators' GPU kernels against float64 autograd of the plain formulas, for Triton's and CUDA's.

``ops.NAME`` and ``ops.NAME_backward`` are the kernels; ``assert_close(found, exact, eager, name, dtype, usual)`` decides whether
a result is right, given the float64 formula's, the formula's in the kernels' dtype, and a usual magnitude.
"""

import pytest
import torch
import torch.nn.functional as F

from gsto_ops.ops import layout_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NO_SCALE = (None, None)
layouts = pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
every_seed = pytest.mark.parametrize(
    "seeds", [(True, False, False, False), (True, True, True, True)], ids=["plain", "statistics"]
)
aten = torch.ops.aten


def layout(tensor, last):
    if tensor is None or tensor.dim() != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def parameter(*shape, dtype, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


def transfer(x, size, mode, align_corners=False, scale=NO_SCALE):
    if mode == "avg":
        return F.adaptive_avg_pool2d(x, size)
    if mode == "bilinear":
        return aten.upsample_bilinear2d(x, size, align_corners, *scale)
    return aten.upsample_nearest2d(x, size, *scale)


def act(x, activation):
    return x.relu() if activation == "relu" else x


def given_ones(gradients, operands):
    return [g for g, o in zip(gradients, operands, strict=True) if o is not None]


def compare(assert_close, formula, operands, forward, backward, seeds=None):
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
        assert_close(found, exact[i], eager[i], f"output {i}", dtype, 0.05 if i < 2 else 0.5)
    given = [g.to(o.dtype) if wanted else None for g, o, wanted in zip(gradients, outputs, seeds, strict=True)]
    pixels = operands[0].numel() // operands[0].shape[1]
    for i, (found, right, plain) in enumerate(zip(backward(outputs, given), exact_grads, eager_grads, strict=True)):
        # A parameter's gradient is a sum over pixels, whose terms may cancel.
        assert_close(found, right, plain, f"gradient {i}", dtype, 0.05 if i == 0 else 0.5 * pixels**0.5)
    return outputs


def check_gated_scale_transfer(ops, assert_close, case, dtype, last):
    """``case``: batch, channels, out_channels (None: no projection), size, new size, mode, align_corners, scale, activation."""
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
        return ops.gated_scale_transfer(*operands, activation, size, mode, align_corners, *scale)

    def backward(outputs, gradients):
        grads = ops.gated_scale_transfer_backward(
            layout(gradients[0], last), gradients[1], x, outputs[1], rho, weight, shift, activation, mode, align_corners, *scale
        )  # fmt: skip
        assert grads[0].stride() == x.stride() and all(g.dtype == dtype for g in grads)
        assert [g.shape for g in given_ones(grads, operands)] == [o.shape for o in operands if o is not None]
        assert weight is not None or (grads[3].shape == (0,) and grads[4].shape == (0,))
        return given_ones(grads, operands)

    output, gate = compare(assert_close, formula, operands, forward, backward, [True, mode != "avg"])
    assert output.dtype == gate.dtype == dtype and gate.is_contiguous()
    assert output.stride() == layout(output, layout_of(x) == torch.channels_last).stride()


def check_gated_projection(ops, assert_close, case, dtype, last, seeds):
    """``case``: batch, channels, out_channels, height, width."""
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
        grads = ops.gated_projection_backward(layout(dz, last), *others, x, gate, rho, weight, z, mean)
        return given_ones(grads, (x, rho, bias, weight))

    outputs = compare(assert_close, formula, (x, rho, bias, weight), ops.gated_projection, backward, seeds)
    assert outputs[2].dtype == outputs[3].dtype == torch.float32


def check_statistics_of_a_large_mean(ops):
    """Sums of squares would lose a variance that is 1e-8 of the squared mean; merged variances do not."""
    x = 100 + torch.randn(8, 8, 16, 16) * 0.01
    weight = torch.eye(8)[:, :, None, None]
    _, _, mean, var = ops.gated_projection(x, torch.zeros(1, 8, 1, 1), torch.full((1,), 40.0), weight)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), unbiased=False), rtol=1e-2, atol=0)


def check_affine_scale_transfer(ops, assert_close, case, dtype, last):
    """``case``: batch, channels, size, new size, mode, align_corners, scale, activation."""
    batch, channels, hw, size, mode, align_corners, scale, activation = case
    x = layout(parameter(batch, channels, *hw, dtype=dtype), last)
    factors, shifts = torch.randn(channels), torch.randn(channels)

    def formula(x, factors, shifts):
        z = act(factors[:, None, None] * x + shifts[:, None, None], activation).to(x.dtype)
        return (transfer(z, size, mode, align_corners, scale),)

    def forward(*operands):
        return (ops.affine_scale_transfer(*operands, activation, size, mode, align_corners, *scale),)

    def backward(outputs, gradients):
        gradient = layout(gradients[0], last)
        return ops.affine_scale_transfer_backward(gradient, x, factors, shifts, activation, mode, align_corners, *scale)

    compare(assert_close, formula, (x, factors, shifts), forward, backward)


def check_gated_pyramid_pool(ops, assert_close, case, dtype, last):
    """``case``: batch, channels, size, bins."""
    batch, channels, hw, bins = case
    x = layout(parameter(batch, channels, *hw, dtype=dtype), last)
    rho = parameter(len(bins), channels, 1, 1, dtype=dtype, scale=channels**-0.5)
    bias = parameter(len(bins), dtype=dtype) if batch == 1 else None

    def formula(x, rho, bias):
        gate = F.conv2d(x, rho, bias).sigmoid()
        pooled = [F.adaptive_avg_pool2d(gate[:, k : k + 1] * x, b).flatten(2) for k, b in enumerate(bins)]
        return torch.cat(pooled, 2), gate

    def forward(x, rho, bias):
        return ops.gated_pyramid_pool(x, rho, bias, bins)

    def backward(outputs, gradients):
        grads = ops.gated_pyramid_pool_backward(*gradients, x, outputs[1], rho, bins)
        assert grads[0].stride() == x.stride()
        return given_ones(grads, (x, rho, bias))

    compare(assert_close, formula, (x, rho, bias), forward, backward, [True, batch == 1])


def check_empty_batch(ops, dtype, last):
    """No image: outputs without elements, gradients of zero, statistics that are not a number."""
    x, gate = layout(torch.randn(0, 18, 6, 6, dtype=dtype), last), torch.randn(0, 1, 6, 6, dtype=dtype)
    rho, weight = torch.randn(1, 18, 1, 1, dtype=dtype), torch.randn(36, 18, 1, 1, dtype=dtype)
    bias, scale = torch.randn(36, dtype=dtype), torch.randn(18)
    for mode, size, activation in (("bilinear", (12, 12), "none"), ("avg", (3, 3), "none"), ("avg", (6, 6), "relu")):
        out, _ = ops.gated_scale_transfer(x, rho, None, weight, bias, activation, size, mode, False, *NO_SCALE)
        assert out.shape == (0, 36, *size)
        grads = ops.gated_scale_transfer_backward(
            out, None, x, gate, rho, weight, bias, activation, mode, False, *NO_SCALE
        )
        assert grads[0].shape == x.shape and all((g == 0).all() for g in grads)
    z, _, mean, var = ops.gated_projection(x, rho, None, weight)
    assert z.shape == (0, 36, 6, 6) and mean.isnan().all() and var.isnan().all()
    grads = ops.gated_projection_backward(z, None, mean, var, x, gate, rho, weight, z, mean)
    assert all((g == 0).all() for g in grads)
    grads = ops.affine_scale_transfer_backward(x, x, scale, scale, "relu", "avg", False, *NO_SCALE)
    assert all((g == 0).all() for g in grads)
    pooled, gates = ops.gated_pyramid_pool(x, weight[:2], None, (1, 2))
    assert pooled.shape == (0, 18, 5)
    assert all((g == 0).all() for g in ops.gated_pyramid_pool_backward(pooled, None, x, gates, weight[:2], (1, 2)))
