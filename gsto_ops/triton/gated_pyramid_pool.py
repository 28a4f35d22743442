"""``gated_pyramid_pool`` in Triton: K gates and K pooled maps; the map is read twice, the second time from L2."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import images_per_chunk, new_map
from .product import gates
from .pyramid import pool, windows_of
from .pyramid_backward import pyramid_backward


def forward(input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, bins: Sequence[int]) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = input.shape
    gate_weight = gate_weight.contiguous()
    pooled = input.new_empty((batch, channels, sum(b * b for b in bins)))
    gate = input.new_empty((batch, len(bins), height, width))
    windows = windows_of(tuple((b, b) for b in bins), height, width, input.device)
    step = images_per_chunk(batch, channels * height * width * input.element_size())
    for first in range(0, batch, step):
        part = slice(first, first + step)
        gates(input[part], gate_weight, gate_bias, gate[part])
        pool(input[part], gate[part], windows, pooled[part])
    return pooled, gate


def backward(
    grad_pooled: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    bins: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input = new_map(input, *input.shape[1:])
    grad_gate_weight = torch.empty(gate_weight.shape, dtype=input.dtype, device=input.device)
    grad_gate_bias = input.new_empty(len(bins))
    pyramid_backward(
        grad_pooled,
        None if grad_gate is None else grad_gate.contiguous(),
        input,
        gate.contiguous(),
        gate_weight.contiguous(),
        tuple((b, b) for b in bins),
        grad_input,
        grad_gate_weight,
        grad_gate_bias,
    )
    return grad_input, grad_gate_weight, grad_gate_bias
