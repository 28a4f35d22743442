"""The class map of a supervised gate (Eq. 4)."""

import torch.nn.functional as F
from torch import Tensor

from .parts import projection_backward


def class_map(input: Tensor, class_weight: Tensor, class_bias: Tensor | None) -> Tensor:
    """P = W_cls F + b_c (Eq. 4)."""
    return F.conv2d(input, class_weight, class_bias)


def class_map_backward(grad_output: Tensor, input: Tensor, class_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`class_map` for input, class_weight and class_bias."""
    return *projection_backward(grad_output, input, class_weight), grad_output.sum((0, 2, 3))
