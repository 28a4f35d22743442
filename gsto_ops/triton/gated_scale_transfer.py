"""``gated_scale_transfer`` in Triton (Eq. 1-3).

R's rows sum to one, so without an activation it commutes with the projection and its bias, and the projection runs where there
are fewer pixels. Passes over maps, forward:

- no projection, R pools or copies     x -> output                   one kernel
- R pools, no ReLU                     x -> W R(g x)                 one kernel
- R copies                             x -> act(W (g x))             one kernel
- R shrinks otherwise, no ReLU         x -> g; x -> R(g x) -> W R(g x)
- otherwise                            x -> z = act(W (g x)) -> R z  z stays in L2: images are taken a few at a time
"""

import torch
from torch import Tensor

from .gate import fits_gate_pool, gate_backward, gate_pool
from .launch import Resampling, identity, images_per_chunk, new_map, resampling
from .product import Gradient, gates, project, weight_gradient
from .pyramid import pool, windows_of
from .resample import resample, resample_transposed

LARGE_WINDOW = 64  # pixels; larger windows are summed by several programs each


def forward(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    size: tuple[int, int],
    mode: str,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = input.shape
    relu = activation == "relu"
    r = resampling((height, width), tuple(size), mode, align_corners, scale_h, scale_w)
    out_channels = channels if weight is None else weight.shape[0]
    output = new_map(input, out_channels, *size)
    gate = input.new_empty((batch, 1, height, width))
    rho = gate_weight.contiguous()
    if weight is not None and (r.identity or relu or not r.shrinks):
        _project_then_resample(r, input, rho, gate_bias, gate, weight, bias, activation, output)
        return output, gate
    pools = (r.mode == "avg" and r.shrinks) or r.identity
    large = r.shrinks and r.rows[4] * r.cols[4] >= LARGE_WINDOW
    if pools and not large and fits_gate_pool(input, weight):
        gate_pool(r, input, rho, gate_bias, gate, output, weight=weight, bias=bias, relu=relu)
        return output, gate
    step = images_per_chunk(batch, channels * height * width * input.element_size())
    for first in range(0, batch, step):
        part = slice(first, first + step)
        x, g = input[part], gate[part]
        gates(x, rho, gate_bias, g)
        small = output[part] if weight is None else new_map(input, channels, *size, images=x.shape[0])
        _resample_gated(r, x, g, relu, small)
        if weight is not None:
            project(small, weight, output[part], bias=bias)
    return output, gate


def _project_then_resample(
    r: Resampling,
    input: Tensor,
    rho: Tensor,
    gate_bias: Tensor | None,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    output: Tensor,
) -> None:
    operands = {"bias": bias, "gate_weight": rho, "gate_bias": gate_bias, "activation": activation}
    if r.identity:
        project(input, weight, output, gate=gate, **operands)
        return
    batch, _, height, width = input.shape
    step = images_per_chunk(batch, weight.shape[0] * height * width * input.element_size())
    between = new_map(input, weight.shape[0], height, width, images=min(step, batch))
    for first in range(0, batch, step):
        part = slice(first, first + step)
        z = between[: min(step, batch - first)]
        project(input[part], weight, z, gate=gate[part], **operands)
        resample(r, z, output[part])


def _resample_gated(r: Resampling, input: Tensor, gate: Tensor, relu: bool, dest: Tensor) -> None:
    """dest = R act(g x), with g at hand."""
    if r.mode == "avg" and not relu and r.rows[4] * r.cols[4] >= LARGE_WINDOW:
        # A fresh map is dense: its pixels are one axis, with the stride of W.
        flat = dest.as_strided(
            (dest.shape[0], dest.shape[1], r.rows[1] * r.cols[1]), (dest.stride(0), dest.stride(1), dest.stride(3))
        )
        windows = windows_of(((r.rows[1], r.cols[1]),), r.rows[0], r.cols[0], input.device)
        pool(input, gate, windows, flat)
    else:
        resample(r, input, dest, gate=gate, relu=relu)


def backward(
    grad_output: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    mode: str,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels, height, width = input.shape[1:]
    size = tuple(grad_output.shape[2:])
    relu = activation == "relu"
    r = resampling((height, width), size, mode, align_corners, scale_h, scale_w)
    copy = identity((height, width))
    gate, rho = gate.contiguous(), gate_weight.contiguous()
    grad_input = new_map(input, channels, height, width)
    grad_gate_weight = torch.empty(gate_weight.shape, dtype=input.dtype, device=input.device)
    grad_gate_bias = input.new_empty(1)
    operands = (input, gate, rho, None if grad_gate is None else grad_gate.contiguous())
    grads = {"grad_input": grad_input, "grad_gate_weight": grad_gate_weight, "grad_gate_bias": grad_gate_bias}
    if weight is None:
        if not (r.identity or r.shrinks):  # many taps per pixel: gathered once
            grad_output, r = _gathered(r, grad_output, input), copy
        gate_backward(r, Gradient(grad_output), *operands, relu=relu, **grads)
        return grad_input, grad_gate_weight, grad_gate_bias, input.new_empty(0), input.new_empty(0)
    grad_weight = torch.empty(weight.shape, dtype=input.dtype, device=input.device)
    grad_bias = input.new_empty(weight.shape[0])
    if r.shrinks and not relu:  # the products where there are fewer pixels
        du = new_map(input, channels, *size)
        project(grad_output, weight, du, transposed=True)
        gate_backward(r, Gradient(du), *operands, **grads)
        pooled = new_map(input, channels, *size)
        _resample_gated(r, input, gate, False, pooled)
        weight_gradient(Gradient(grad_output), pooled, None, grad_weight, grad_bias)
        return grad_input, grad_gate_weight, grad_gate_bias, grad_weight, grad_bias
    before = grad_output
    if relu:  # which pixels passed the ReLU is known from z, made again
        z = new_map(input, weight.shape[0], height, width)
        project(input, weight, z, bias=bias, gate=gate)
        before = _gathered(r, grad_output, input, before=z)
    elif not r.identity:
        before = _gathered(r, grad_output, input)
    dz = Gradient(before)
    gate_backward(copy, dz, *operands, weight=weight, **grads)
    weight_gradient(dz, input, gate, grad_weight, grad_bias)
    return grad_input, grad_gate_weight, grad_gate_bias, grad_weight, grad_bias


def _gathered(r: Resampling, grad_output: Tensor, input: Tensor, before: Tensor | None = None) -> Tensor:
    """R^T grad_output, where the map before a ReLU is positive, as a new map in the layout of ``input``."""
    dest = new_map(input, grad_output.shape[1], *input.shape[2:])
    resample_transposed(r, grad_output, dest, before=before, relu=before is not None)
    return dest
