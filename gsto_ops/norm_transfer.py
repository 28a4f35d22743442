"""A gated scale transfer with a norm: ``gated_batch_norm_transfer``, and ``gated_norm_transfer`` with modules for its steps."""

from typing import Any

import torch
from torch import Tensor, nn

from . import checks, reference
from .checks import ScaleFactor, Size
from .functional import Activation, Mode, _operators, _outside_autocast, gated_scale_transfer, scale_transfer
from .norm_sum import update_running_statistics


def gated_batch_norm_transfer(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-5,
    activation: Activation = None,
    size: Size | None = None,
    scale_factor: ScaleFactor | None = None,
    mode: Mode = "bilinear",
    align_corners: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ST(act(BN(W(gate * input))))`` with the batch's own statistics (Fig. 2, in training); no normalised map is written.

    Args:
        input: (N, C, H, W), with more than one pixel in all. gate_weight: (1, C, 1, 1). gate_bias: (1,) or None.
        weight: (C', C, 1, 1). norm_weight, norm_bias: (C',), as ``nn.BatchNorm2d`` names them. eps: added to the variance.
        activation, size, scale_factor, mode, align_corners: as in :func:`gated_scale_transfer`.

    Returns:
        (output (N, C', H', W'), mean (C',), var (C',)): mean and biased variance of the projection over N, H, W, in float32
        (float64 for float64 input), for running statistics: no gradient flows through them.

    Raises:
        ValueError, TypeError: as :func:`gated_scale_transfer`; one value per channel.
    """
    batch, channels, height, width = checks.check_input(input)
    if weight is None:
        raise TypeError("weight must be a torch.Tensor, got None (without a projection, use gated_scale_transfer)")
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
            given = parameter.dtype if isinstance(parameter, Tensor) else type(parameter).__name__
            raise TypeError(f"{name} must be a floating-point torch.Tensor, got {given}")
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps must be a number >= 0, got {eps!r}")
    checks.check_parameters(
        input,
        ("gate_weight", gate_weight, (1, channels, 1, 1), "(1, in_channels, 1, 1)"),
        ("gate_bias", gate_bias, (1,), "one number"),
        ("weight", weight, (None, channels, 1, 1), "(out_channels, in_channels, 1, 1)"),
    )
    out_channels, dtype = weight.shape[:1], reference.statistics_dtype(input)
    if batch * height * width < 2:
        raise ValueError(
            f"batch norm in training mode needs more than one value per channel, got {(batch, *out_channels, height, width)}"
        )
    if norm_weight.dtype is not dtype or norm_bias.dtype is not dtype:
        norm_weight, norm_bias = norm_weight.to(dtype), norm_bias.to(dtype)
    checks.check_parameters(
        input,
        ("norm_weight", norm_weight, out_channels, "(out_channels,)"),
        ("norm_bias", norm_bias, out_channels, "(out_channels,)"),
        dtype=dtype,
    )
    checks.check_mode(mode, align_corners)
    act = checks.check_activation(activation)
    out_size, factors = checks.output_size(input, size, scale_factor)
    norm: tuple[Any, ...] = (norm_weight, norm_bias, eps, act, out_size, mode, align_corners)

    def run(*operands: Any) -> tuple[Tensor, ...]:
        operators = _operators("gated_batch_norm_transfer", operands[0])
        if operators is None:
            arguments: tuple[Any, ...] = (*operands, *norm, factors)
            return reference.gated_batch_norm_transfer(*arguments)
        return operators.gated_batch_norm_transfer(*operands, *norm, *(factors or (None, None)))

    output, _, _, mean, var = _outside_autocast(run, input, gate_weight, gate_bias, weight)
    return output, mean, var


def gated_norm_transfer(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    projection: nn.Conv2d,
    norm: nn.Module | None,
    *,
    activation: Activation = None,
    **transfer: Any,
) -> Tensor:
    """Gate, multiply, project, normalise, activate, resample (Fig. 2), with as few passes over memory as ``norm`` allows.

    - No norm (None or ``nn.Identity``), or a batch norm in eval mode, which is folded into the projection: one operator,
      ``gated_scale_transfer``.
    - A batch norm in training mode: :func:`gated_batch_norm_transfer`. Running statistics are updated as by ``nn.BatchNorm2d``.
    - Any other norm (SyncBatchNorm, GroupNorm, ...): it runs by itself between the two.

    Args:
        input: (N, C, H, W). gate_weight: (1, C, 1, 1). gate_bias: (1,) or None.
        projection: a 1x1 convolution C -> C'; only its parameters are used. norm: a module on (N, C', H, W), or None.
        activation: None or ``"relu"``. transfer: size or scale_factor, mode, align_corners of ``gated_scale_transfer``.

    Returns:
        (N, C', H', W').

    Raises:
        ValueError, TypeError: as ``gated_scale_transfer``; a batch norm in training mode with one value per channel.
    """
    checks.check_activation(activation)
    if not isinstance(projection, nn.Conv2d):
        raise TypeError(f"projection must be a 1x1 torch.nn.Conv2d, got {type(projection).__name__}")
    if norm is not None and not isinstance(norm, nn.Module):
        raise TypeError(f"norm must be a torch.nn.Module or None, got {norm!r}")
    gate = (gate_weight, gate_bias)
    if norm is None or type(norm) is nn.Identity:
        return gated_scale_transfer(input, *gate, projection.weight, projection.bias, activation=activation, **transfer)
    if type(norm) is not nn.BatchNorm2d or not norm.affine or projection.bias is not None:
        output = norm(gated_scale_transfer(input, *gate, projection.weight, projection.bias, scale_factor=1))
        return scale_transfer(output.relu() if activation == "relu" else output, **transfer)
    if not norm.training and norm.running_mean is not None and norm.running_var is not None:
        scale, shift = _affine(norm, norm.running_mean, norm.running_var)
        weight = (projection.weight * scale[:, None, None, None]).to(projection.weight.dtype)
        shift = shift.to(projection.weight.dtype)
        return gated_scale_transfer(input, *gate, weight, shift, activation=activation, **transfer)
    output, mean, var = gated_batch_norm_transfer(
        input, *gate, projection.weight, norm.weight, norm.bias, eps=norm.eps, activation=activation, **transfer
    )
    operators = _operators("gated_batch_norm_transfer", input)
    with torch.no_grad():
        update_running_statistics(operators, [norm], [mean], [var], [input.numel() // input.shape[1]])
    return output


def _affine(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Batch norm as x -> scale · x + shift per channel, in float32 whatever the parameters' dtype (float64 for float64)."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    scale = norm.weight.to(dtype) * (var.to(dtype) + norm.eps).rsqrt()
    return scale, norm.bias.to(dtype) - mean.to(dtype) * scale
