"""All that leaves one branch of a gated fusion (Eq. 4, Section 3.2.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .channel_statistics import channel_statistics
from .parts import activate, projection_backward, statistics_dtype


def gated_split(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    split: Sequence[int],
    copies: int,
    activation: str,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    """All that leaves one branch of a gated fusion (Eq. 4, Section 3.2.1): K gates, the first ones for projections.

    Returns (projected, gated, gate, mean, var): z_k = W_k(gate_k ⊙ F) for the row groups ``split`` of W; gate_k ⊙ F for the
    next ``copies`` gates (further gates are only computed); (N, K, H, W); the statistics of all channels of the z_k.
    """
    gate = activate(F.conv2d(input, gate_weight, gate_bias), activation).sigmoid()
    gates = gate.split(1, 1)
    gated = [g * input for g in gates[len(split) : len(split) + copies]]
    if weight is None:
        empty = input.new_empty(0, dtype=statistics_dtype(input))
        return [], gated, gate, empty, empty.clone()
    rows = F.conv2d(input, weight).split(list(split), 1)
    projected = [g * z for g, z in zip(gates, rows, strict=False)]
    mean, var = (torch.cat(values) for values in zip(*map(channel_statistics, projected), strict=True))
    return projected, gated, gate, mean, var


def gated_split_backward(
    grad_projected: Sequence[Tensor],
    grad_gated: Sequence[Tensor],
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_split` for input, gate_weight, gate_bias and weight (of an absent one: no elements)."""
    gates = gate.split(1, 1)
    grads_weight = []
    grads = list(grad_gated)  # of gate_k ⊙ F
    if weight is not None:
        blocks = weight.split([grad.shape[1] for grad in grad_projected])
        pairs = [projection_backward(g, k * input, w) for g, k, w in zip(grad_projected, gates, blocks, strict=False)]
        grads = [grad for grad, _ in pairs] + grads
        grads_weight = [grad for _, grad in pairs]
    grad_of_gate = torch.zeros_like(gate)
    for k, grad in enumerate(grads):
        grad_of_gate[:, k : k + 1] = (grad * input).sum(1, keepdim=True)
    if grad_gate is not None:
        grad_of_gate = grad_of_gate + grad_gate
    grad_logit = grad_of_gate * gate * (1 - gate)
    if activation == "relu":
        grad_logit = grad_logit * (gate > 0.5)  # σ(ReLU(logit)) is 0.5 where the ReLU is closed
    grad_input = torch.einsum("nkhw,kc->nchw", grad_logit, gate_weight[:, :, 0, 0])
    for g, grad in zip(gates, grads, strict=False):
        grad_input = grad_input + g * grad
    grad_gate_weight = torch.einsum("nkhw,nchw->kc", grad_logit, input)[:, :, None, None]
    grad_weight = torch.cat(grads_weight) if grads_weight else input.new_empty(0)
    return grad_input, grad_gate_weight, grad_logit.sum((0, 2, 3)), grad_weight
