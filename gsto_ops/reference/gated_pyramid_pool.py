"""The gated poolings of a pyramid (Section 3.3, Fig. 4)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import gate_backward
from .scale_transfer import adaptive_pool, scale_transfer_backward


def gated_pyramid_pool(
    input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, bins: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gates of all bins and the pooled maps of ``gate_k ⊙ F`` (Section 3.3, Fig. 4).

    Returns (pooled, gate): (N, C, Σ b²), bin after bin, each flattened; (N, K, H, W).
    """
    gate = F.conv2d(input, gate_weight, gate_bias).sigmoid()
    pooled = [adaptive_pool(gate[:, k : k + 1] * input, (b, b)).flatten(2) for k, b in enumerate(bins)]
    return torch.cat(pooled, 2), gate


def gated_pyramid_pool_backward(
    grad_pooled: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    bins: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_pyramid_pool` for input, gate_weight and gate_bias."""
    grad_input = torch.zeros_like(input)
    grads_weight, grads_bias = [], []
    grads_pooled = grad_pooled.split([b * b for b in bins], 2)
    for k, b in enumerate(bins):
        grad = scale_transfer_backward(grads_pooled[k].unflatten(2, (b, b)), input.shape, "avg")
        gate_k, weight_k = gate[:, k : k + 1], gate_weight[k : k + 1]
        grad_k, grad_weight, grad_bias = gate_backward(
            grad, None if grad_gate is None else grad_gate[:, k : k + 1], input, gate_k, weight_k
        )
        grad_input = grad_input + grad_k
        grads_weight.append(grad_weight)
        grads_bias.append(grad_bias)
    return grad_input, torch.cat(grads_weight), torch.cat(grads_bias)
