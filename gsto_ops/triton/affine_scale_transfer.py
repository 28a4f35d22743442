"""``affine_scale_transfer`` in Triton: R act(scale x + shift), one pass each way."""

import torch
from torch import Tensor

from .launch import new_map, resampling
from .resample import resample, resample_transposed


def forward(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    size: tuple[int, int],
    mode: str,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> Tensor:
    r = resampling(tuple(input.shape[2:]), tuple(size), mode, align_corners, scale_h, scale_w)
    output = new_map(input, input.shape[1], *size)
    resample(r, input, output, scale=scale.contiguous(), shift=shift.contiguous(), relu=activation == "relu")
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    mode: str,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    r = resampling(tuple(input.shape[2:]), tuple(grad_output.shape[2:]), mode, align_corners, scale_h, scale_w)
    grad_input = new_map(input, *input.shape[1:])
    grad_scale, grad_shift = (torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in (scale, shift))
    resample_transposed(
        r,
        grad_output,
        grad_input,
        before=input,
        scale=scale.contiguous(),
        shift=shift.contiguous(),
        relu=activation == "relu",
        outputs=(grad_scale, grad_shift),
    )
    return grad_input, grad_scale, grad_shift
