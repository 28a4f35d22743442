"""The reference against a per-pixel NumPy form of Eq. 1-6, written from the definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gsto_ops import reference

SIZES = [
    ((5, 7), (5, 7)),
    ((5, 7), (10, 14)),
    ((5, 7), (2, 3)),
    ((4, 8), (2, 4)),
    ((3, 5), (7, 6)),
    ((6, 3), (2, 9)),
    ((1, 1), (3, 2)),
]
MODES = [("bilinear", False), ("bilinear", True), ("avg", False), ("nearest", False)]


def axis_matrix(length: int, out: int, mode: str, align_corners: bool, scale: float | None = None) -> np.ndarray:
    """The (out, length) matrix of one axis of the resampling, from the definition of each mode."""
    matrix = np.zeros((out, length))
    step = length / out if scale is None else 1 / scale
    for o in range(out):
        if mode == "avg":
            start, end = o * length // out, math.ceil((o + 1) * length / out)
            matrix[o, start:end] = 1 / (end - start)
        elif mode == "nearest":
            matrix[o, min(int(o * step), length - 1)] = 1
        else:
            position = max((o + 0.5) * step - 0.5, 0.0)
            if align_corners:
                position = o * (length - 1) / max(out - 1, 1)
            low = min(int(position), length - 1)
            high = min(low + 1, length - 1)
            matrix[o, low] += 1 - (position - low)
            matrix[o, high] += position - low
    return matrix


def numpy_gsto(x, rho, b, w, c, size, mode, align_corners, scale=None):
    """Eq. 1-3 for arrays: x (N, C, H, W), rho (C,), b number, w (C', C) or None, c (C',) or None."""
    gate = 1 / (1 + np.exp(-(np.einsum("nchw,c->nhw", x, rho) + b)))[:, None]
    y = gate * x
    if w is not None:
        y = np.einsum("nchw,oc->nohw", y, w) + (0 if c is None else c[:, None, None])
    rows = axis_matrix(x.shape[2], size[0], mode, align_corners, scale and scale[0])
    columns = axis_matrix(x.shape[3], size[1], mode, align_corners, scale and scale[1])
    return np.einsum("ph,qw,nohw->nopq", rows, columns, y), gate


def operands(in_size, channels=3, out_channels=4):
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    return (
        make(2, channels, *in_size),
        make(1, channels, 1, 1),
        make(1),
        make(out_channels, channels, 1, 1),
        make(out_channels),
    )


@pytest.mark.parametrize("mode, align_corners", MODES)
@pytest.mark.parametrize("in_size, size", SIZES)
def test_unsupervised_equals_numpy(in_size, size, mode, align_corners):
    x, rho, b, w, c = operands(in_size)
    expected, expected_gate = numpy_gsto(
        x.numpy(), rho.flatten().numpy(), b.item(), w[:, :, 0, 0].numpy(), c.numpy(), size, mode, align_corners
    )
    output, gate = reference.gated_scale_transfer(x, rho, b, w, c, "none", size, mode, align_corners)
    np.testing.assert_allclose(output.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(gate.numpy(), expected_gate, atol=1e-14)
    expected, _ = numpy_gsto(x.numpy(), rho.flatten().numpy(), 0.0, None, None, size, mode, align_corners)
    output, _ = reference.gated_scale_transfer(x, rho, None, None, None, "none", size, mode, align_corners)
    np.testing.assert_allclose(output.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_given_scale_sets_the_step(mode):
    x, rho, b, w, c = operands((7, 9))
    scale = (1.5, 0.7)
    size = (10, 6)
    arguments = (x.numpy(), rho.flatten().numpy(), b.item(), w[:, :, 0, 0].numpy(), c.numpy(), size, mode, False)
    output, _ = reference.gated_scale_transfer(x, rho, b, w, c, "none", size, mode, False, scale)
    np.testing.assert_allclose(
        output.numpy(), numpy_gsto(*arguments, scale)[0], atol=1e-6 if mode == "bilinear" else 1e-12
    )
    assert not np.allclose(output.numpy(), numpy_gsto(*arguments)[0])


def test_supervised_equals_numpy():
    x, *_ = operands((6, 4))
    w_cls, b_cls = torch.randn(5, 3, 1, 1, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    theta, b = torch.randn(1, 5, 1, 1, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    output, class_map, gate = reference.supervised_gated_scale_transfer(
        x, w_cls, b_cls, theta, b, None, None, "none", (3, 2), "avg"
    )
    expected_map = np.einsum("nchw,oc->nohw", x.numpy(), w_cls[:, :, 0, 0].numpy()) + b_cls.numpy()[:, None, None]
    expected_gate = 1 / (1 + np.exp(-(np.einsum("nchw,c->nhw", expected_map, theta.flatten().numpy()) + b.item())))
    np.testing.assert_allclose(class_map.numpy(), expected_map, atol=1e-13)
    np.testing.assert_allclose(gate[:, 0].numpy(), expected_gate, atol=1e-14)
    pooled = (gate * x).reshape(2, 3, 3, 2, 2, 2).mean((3, 5))
    np.testing.assert_allclose(output.numpy(), pooled.numpy(), atol=1e-14)


def check_backward(forward, backward, tensors, differentiable):
    """``backward(grads)`` against autograd through ``forward(*tensors)``."""
    for tensor in differentiable:
        tensor.requires_grad_()
    outputs = forward(*tensors)
    grads = [torch.randn_like(output) for output in outputs]
    expected = torch.autograd.grad(outputs, differentiable, grads)
    with torch.no_grad():
        actual = backward(outputs, grads)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("mode, align_corners", MODES)
@pytest.mark.parametrize("in_size, size", SIZES)
def test_gated_scale_transfer_backward(in_size, size, mode, align_corners, activation):
    x, rho, _b, w, c = tensors = operands(in_size)
    check_backward(
        lambda *t: reference.gated_scale_transfer(*t, activation, size, mode, align_corners),
        lambda outputs, grads: reference.gated_scale_transfer_backward(
            *grads, x, outputs[1], rho, w, c, activation, mode, align_corners
        ),
        tensors,
        tensors,
    )


def test_class_map():
    x, _, _, w, c = operands((5, 7))
    expected = np.einsum("nchw,oc->nohw", x.numpy(), w[:, :, 0, 0].numpy()) + c.numpy()[:, None, None]
    np.testing.assert_allclose(reference.class_map(x, w, c).numpy(), expected, atol=1e-13)
    check_backward(
        lambda *t: (reference.class_map(*t),),
        lambda outputs, grads: reference.class_map_backward(*grads, x, w),
        (x, w, c),
        (x, w, c),
    )


def test_gated_projection():
    x, rho, b, w, _ = operands((5, 7))
    output, _, mean, var = reference.gated_projection(x, rho, b, w)
    expected, _ = numpy_gsto(
        x.numpy(), rho.flatten().numpy(), b.item(), w[:, :, 0, 0].numpy(), None, (5, 7), "nearest", False
    )
    np.testing.assert_allclose(output.numpy(), expected, atol=1e-13)
    np.testing.assert_allclose(mean.numpy(), expected.mean((0, 2, 3)), atol=1e-13)
    np.testing.assert_allclose(var.numpy(), expected.var((0, 2, 3)), atol=1e-13)
    check_backward(
        reference.gated_projection,
        lambda outputs, grads: reference.gated_projection_backward(
            *grads, x, outputs[1], rho, w, outputs[0], outputs[2]
        ),
        (x, rho, b, w),
        (x, rho, b, w),
    )


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("mode, align_corners", MODES)
@pytest.mark.parametrize("in_size, size", SIZES)
def test_affine_scale_transfer(in_size, size, mode, align_corners, activation):
    x, *_ = operands(in_size)
    scale, shift = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    output = reference.affine_scale_transfer(x, scale, shift, activation, size, mode, align_corners)
    affine = x.numpy() * scale.numpy()[:, None, None] + shift.numpy()[:, None, None]
    affine = np.maximum(affine, 0) if activation == "relu" else affine
    rows, columns = (axis_matrix(i, o, mode, align_corners) for i, o in zip(in_size, size, strict=True))
    np.testing.assert_allclose(output.numpy(), np.einsum("ph,qw,nchw->ncpq", rows, columns, affine), atol=1e-12)
    check_backward(
        lambda *t: (reference.affine_scale_transfer(*t, activation, size, mode, align_corners),),
        lambda outputs, grads: reference.affine_scale_transfer_backward(
            *grads, x, scale, shift, activation, mode, align_corners
        ),
        (x, scale, shift),
        (x, scale, shift),
    )


def test_gated_pyramid_pool():
    x, *_ = operands((7, 9))
    rho, b = torch.randn(3, 3, 1, 1, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    bins = [1, 2, 6]
    pooled, gate = reference.gated_pyramid_pool(x, rho, b, bins)
    for k, cells in enumerate(pooled.split([n * n for n in bins], 2)):
        n = bins[k]
        row = rho[k].flatten().numpy()
        expected, expected_gate = numpy_gsto(x.numpy(), row, b[k].item(), None, None, (n, n), "avg", False)
        np.testing.assert_allclose(cells.numpy(), expected.reshape(2, 3, -1), atol=1e-13)
        np.testing.assert_allclose(gate[:, k : k + 1].numpy(), expected_gate, atol=1e-14)
    check_backward(
        lambda *t: reference.gated_pyramid_pool(*t, bins),
        lambda outputs, grads: reference.gated_pyramid_pool_backward(*grads, x, outputs[1], rho, bins),
        (x, rho, b),
        (x, rho, b),
    )


def test_identities_hold():
    """The algebra that the kernels use, exact but for rounding (float64)."""
    x, rho, b, w, c = operands((6, 8))
    gate = F.conv2d(x, rho, b).sigmoid()
    direct = F.conv2d(gate * x, w)
    torch.testing.assert_close(direct, gate * F.conv2d(x, w))  # the gate in the projection's epilogue
    both = F.conv2d(x, torch.cat([w, rho]))  # the gate logit as one more row of the projection
    torch.testing.assert_close(direct, (both[:, -1:] + b.view(1, 1, 1, 1)).sigmoid() * both[:, :-1])
    for mode, size in [("avg", (3, 4)), ("avg", (4, 3)), ("bilinear", (12, 16)), ("nearest", (12, 16))]:
        resampled = reference.scale_transfer(F.conv2d(x, w, c), size, mode)  # projection and resampling commute
        torch.testing.assert_close(resampled, F.conv2d(reference.scale_transfer(x, size, mode), w, c))
