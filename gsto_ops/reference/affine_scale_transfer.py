"""A batch norm's affine, activation and resampling."""

from torch import Tensor

from .parts import activate
from .scale_transfer import ScaleFactors, scale_transfer, scale_transfer_backward


def affine_scale_transfer(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    size: tuple[int, int],
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> Tensor:
    """ST(act(scale_c · x + shift_c)): batch norm's affine, activation and resampling."""
    output = (scale[:, None, None] * input + shift[:, None, None]).to(input.dtype)
    return scale_transfer(activate(output, activation), size, mode, align_corners, scale_factors)


def affine_scale_transfer_backward(
    grad_output: Tensor,
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`affine_scale_transfer` for input, scale and shift."""
    grad = scale_transfer_backward(grad_output, input.shape, mode, align_corners, scale_factors).to(scale.dtype)
    if activation == "relu":
        grad = grad * (scale[:, None, None] * input + shift[:, None, None] > 0)
    return (scale[:, None, None] * grad).to(input.dtype), (grad * input).sum((0, 2, 3)), grad.sum((0, 2, 3))
