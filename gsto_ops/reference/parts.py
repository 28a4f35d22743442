"""What the operators share: the activation, the gradients of the gate and of the projection, the dtype of statistics."""

import torch
from torch import Tensor


def activate(x: Tensor, activation: str) -> Tensor:
    return x.relu() if activation == "relu" else x


def gate_backward(
    grad: Tensor, grad_gate: Tensor | None, input: Tensor, gate: Tensor, gate_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``gate ⊙ input`` and of the gate for input, gate_weight and gate_bias; ``grad`` is that of the product."""
    grad_of_gate = (grad * input).sum(1, keepdim=True)
    if grad_gate is not None:
        grad_of_gate = grad_of_gate + grad_gate
    grad_logit = grad_of_gate * gate * (1 - gate)
    grad_input = gate * grad + gate_weight * grad_logit
    grad_gate_weight = (grad_logit * input).sum((0, 2, 3))[None, :, None, None]
    return grad_input, grad_gate_weight, grad_logit.sum((0, 1, 2, 3)).reshape(1)


def projection_backward(grad: Tensor, gated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a 1x1 convolution without bias for its input and its weight."""
    grad_weight = torch.einsum("nohw,nchw->oc", grad, gated)[:, :, None, None]
    return torch.einsum("nohw,oc->nchw", grad, weight[:, :, 0, 0]), grad_weight


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Batch statistics are float32, whatever the map's dtype; float64 for float64."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32
