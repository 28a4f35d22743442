"""The public functions: arguments are checked, a backend is chosen, the operator runs."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks, reference
from .checks import ScaleFactor, Size
from .ops import autocast_operands, library

Mode = Literal["bilinear", "avg", "nearest"]
Activation = Literal["relu"] | None
OPERATORS = {
    "cuda": library.operators["gsto_ops"],
    "triton": library.operators["gsto_triton"],
    "cpu": library.operators["gsto_ops"],
    "reference": None,
}
MAX_CUDA_BIN = 128  # cells per axis that the CUDA kernels have tables for; pyramids in use stop at 6


@overload
def gated_scale_transfer(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    activation: Activation = ...,
    size: Size | None = ...,
    scale_factor: ScaleFactor | None = ...,
    mode: Mode = ...,
    align_corners: bool = ...,
    return_gate: Literal[False] = ...,
) -> Tensor: ...


@overload
def gated_scale_transfer(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    activation: Activation = ...,
    size: Size | None = ...,
    scale_factor: ScaleFactor | None = ...,
    mode: Mode = ...,
    align_corners: bool = ...,
    return_gate: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def gated_scale_transfer(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    size: Size | None = None,
    scale_factor: ScaleFactor | None = None,
    mode: Mode = "bilinear",
    align_corners: bool = False,
    return_gate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Unsupervised gated scale transfer (arXiv 2005.13363, Section 3.1, Eq. 1-3).

    ``gate = σ(conv1x1(input, gate_weight, gate_bias))``, then ``ST(act(conv1x1(gate * input, weight, bias)))``: gate,
    multiply, project, resample. A batch norm in eval mode folds into ``weight`` and ``bias``.

    Args:
        input: (N, C, H, W), float32, float64, bfloat16 or float16, any strides. N may be 0.
        gate_weight: (1, C, 1, 1). gate_bias: (1,) or None.
        weight: projection (C', C, 1, 1), or None for none (then C' = C). bias: (C',) or None.
        activation: None or ``"relu"``, between projection and resampling.
        size: output size (H', W') or one int for both. scale_factor: multiplier of H and W, a number or a pair. Exactly one
            of the two; ``scale_factor=1`` keeps the size (identity transfer).
        mode: ``"bilinear"`` and ``"nearest"`` as in ``F.interpolate``, ``"avg"`` is adaptive average pooling.
        align_corners: as in ``F.interpolate``, for ``"bilinear"`` only.
        return_gate: also return the gate; gradients flow through it.

    Returns:
        output (N, C', H', W') in the dtype of ``input`` (autocast's dtype under autocast), channels_last where ``input`` is;
        with ``return_gate``, (output, gate), the gate (N, 1, H, W) at the input's resolution.

    Raises:
        ValueError: shapes, sizes, devices or mode that cannot work. TypeError: wrong types or mixed dtypes.
    """
    channels = checks.check_input(input)[1]
    checks.check_parameters(
        input,
        ("gate_weight", gate_weight, (1, channels, 1, 1), "(1, in_channels, 1, 1)"),
        ("gate_bias", gate_bias, (1,), "one number"),
    )
    checks.check_projection(weight, bias, input)
    checks.check_mode(mode, align_corners)
    act = checks.check_activation(activation)
    out_size, scale = checks.output_size(input, size, scale_factor)
    arguments = (input, gate_weight, gate_bias, weight, bias, act, out_size, mode, align_corners, scale)
    if checks.autocast_enabled(input.device):
        output, gate = _outside_autocast(_gated_scale_transfer, *arguments)
    else:
        output, gate = _gated_scale_transfer(*arguments)
    return (output, gate) if return_gate else output


def _gated_scale_transfer(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    size: tuple[int, int],
    mode: str,
    align_corners: bool,
    scale: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    operands = (input, gate_weight, gate_bias, weight, bias)
    operators = _operators("gated_scale_transfer", input)
    if operators is None:
        return reference.gated_scale_transfer(*operands, activation, size, mode, align_corners, scale)
    return operators.gated_scale_transfer(*operands, activation, size, mode, align_corners, *(scale or (None, None)))


@overload
def supervised_gated_scale_transfer(
    input: Tensor,
    class_weight: Tensor,
    class_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    activation: Activation = ...,
    size: Size | None = ...,
    scale_factor: ScaleFactor | None = ...,
    mode: Mode = ...,
    align_corners: bool = ...,
    return_gate: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def supervised_gated_scale_transfer(
    input: Tensor,
    class_weight: Tensor,
    class_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    activation: Activation = ...,
    size: Size | None = ...,
    scale_factor: ScaleFactor | None = ...,
    mode: Mode = ...,
    align_corners: bool = ...,
    return_gate: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def supervised_gated_scale_transfer(
    input: Tensor,
    class_weight: Tensor,
    class_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    size: Size | None = None,
    scale_factor: ScaleFactor | None = None,
    mode: Mode = "bilinear",
    align_corners: bool = False,
    return_gate: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Supervised gated scale transfer (arXiv 2005.13363, Section 3.1, Eq. 4-6).

    ``class_map = conv1x1(input, class_weight, class_bias)`` is an output, so that a loss can see it;
    ``gate = σ(conv1x1(class_map, gate_weight, gate_bias))``; the rest is :func:`gated_scale_transfer`.

    Args:
        class_weight: (c0, C, 1, 1) for c0 classes. class_bias: (c0,) or None.
        gate_weight: (1, c0, 1, 1). gate_bias: (1,) or None.
        others: as in :func:`gated_scale_transfer`.

    Returns:
        (output, class_map), class_map (N, c0, H, W); with ``return_gate``, (output, class_map, gate).

    Raises:
        ValueError, TypeError: as :func:`gated_scale_transfer`.
    """
    checks.check_input(input)
    checks.check_parameter(
        "class_weight", class_weight, (None, input.shape[1], 1, 1), input, meaning="(classes, in_channels, 1, 1)"
    )
    classes = class_weight.shape[0]
    checks.check_parameter("class_bias", class_bias, (classes,), input, meaning="(classes,)")
    checks.check_parameter("gate_weight", gate_weight, (1, classes, 1, 1), input, meaning="(1, classes, 1, 1)")
    checks.check_parameter("gate_bias", gate_bias, (1,), input, meaning="one number")
    checks.check_projection(weight, bias, input)
    checks.check_mode(mode, align_corners)
    act = checks.check_activation(activation)
    out_size, scale = checks.output_size(input, size, scale_factor)

    operands = (input, class_weight, class_bias, gate_weight, gate_bias, weight, bias)
    output, class_map, gate = _outside_autocast(
        _supervised_gated_scale_transfer, *operands, act, out_size, mode, align_corners, scale
    )
    return (output, class_map, gate) if return_gate else (output, class_map)


def _supervised_gated_scale_transfer(
    input: Tensor,
    class_weight: Tensor,
    class_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *resampling: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    classifier = (class_weight, class_bias, gate_weight, gate_bias)
    backend = backends.select_for("gated_scale_transfer", input)
    if backend == "reference":
        return reference.supervised_gated_scale_transfer(input, *classifier, weight, bias, *resampling)
    # Compilers and exporters get the convolution, as GPUs do: what it becomes is theirs to choose.
    native = backend == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    class_map = library.operators["gsto_ops"].class_map if native else F.conv2d
    output, gate = _gated_scale_transfer(input, *collapse_gate(*classifier), weight, bias, *resampling)
    return output, class_map(input, class_weight, class_bias), gate


def collapse_gate(
    class_weight: Tensor, class_bias: Tensor | None, gate_weight: Tensor, gate_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """θ·(W_cls F + b_c) + b = ρ·F + ρ_b with ρ = W_clsᵀθ: the gate reads the input once, not the class map again."""
    theta = gate_weight.flatten()
    rho = (theta @ class_weight.flatten(1))[None, :, None, None]
    if class_bias is None:
        return rho, gate_bias
    rho_bias = (theta @ class_bias)[None]
    return rho, rho_bias if gate_bias is None else rho_bias + gate_bias


def gated_projection(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gate, multiply, project, with the batch statistics of the result: what a batch norm in training mode needs (Eq. 1, 2).

    Args:
        input: (N, C, H, W). gate_weight: (1, C, 1, 1). gate_bias: (1,) or None. weight: (C', C, 1, 1).

    Returns:
        (output (N, C', H, W), gate (N, 1, H, W), mean (C',), var (C',)): mean and biased variance of ``output`` over N, H, W,
        in float32 (float64 for float64 input). Gradients flow through all four. Follow with :func:`affine_scale_transfer`.

    Raises:
        ValueError, TypeError: as :func:`gated_scale_transfer`.
    """
    channels = checks.check_input(input)[1]
    checks.check_parameters(
        input,
        ("gate_weight", gate_weight, (1, channels, 1, 1), "(1, in_channels, 1, 1)"),
        ("gate_bias", gate_bias, (1,), "one number"),
    )
    if weight is None:
        raise TypeError("weight must be a torch.Tensor, got None (without a projection, use gated_scale_transfer)")
    checks.check_projection(weight, None, input)
    return _outside_autocast(_gated_projection, input, gate_weight, gate_bias, weight)


def _gated_projection(input: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operators = _operators("gated_projection", input)
    return (reference if operators is None else operators).gated_projection(input, *operands)


def affine_scale_transfer(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    activation: Activation = None,
    size: Size | None = None,
    scale_factor: ScaleFactor | None = None,
    mode: Mode = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """``ST(act(scale_c * input + shift_c))``: the affine of a batch norm, the activation and the resampling in one pass.

    Args:
        input: (N, C, H, W). scale, shift: (C,), float32 whatever the input's dtype (float64 for float64 input).
        activation, size, scale_factor, mode, align_corners: as in :func:`gated_scale_transfer`.

    Returns:
        (N, C, H', W') in the dtype of ``input``, under autocast too.

    Raises:
        ValueError, TypeError: as :func:`gated_scale_transfer`.
    """
    channels = checks.check_input(input)[1]
    checks.check_parameters(
        input,
        ("scale", scale, (channels,), "(channels,)"),
        ("shift", shift, (channels,), "(channels,)"),
        dtype=reference.statistics_dtype(input),
    )
    checks.check_mode(mode, align_corners)
    act = checks.check_activation(activation)
    out_size, factors = checks.output_size(input, size, scale_factor)
    operators = _operators("affine_scale_transfer", input)
    if operators is None:
        return reference.affine_scale_transfer(input, scale, shift, act, out_size, mode, align_corners, factors)
    resampling = (act, out_size, mode, align_corners, *(factors or (None, None)))
    return operators.affine_scale_transfer(input, scale, shift, *resampling)


def gated_pyramid_pool(
    input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None = None, *, bins: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """The gated poolings of a pyramid pooling module (Section 3.3, Fig. 4): every bin has its own gate on the feature.

    Args:
        input: (N, C, H, W). gate_weight: (K, C, 1, 1), one row per bin. gate_bias: (K,) or None.
        bins: K positive ints; bin b is pooled adaptively to b x b.

    Returns:
        (pooled, gate): a list of K maps (N, C, b, b), and the gates (N, K, H, W), from one read of the input.

    Raises:
        ValueError, TypeError: as :func:`gated_scale_transfer`; bins that are not positive ints.
    """
    channels = checks.check_input(input)[1]
    if not isinstance(bins, (tuple, list)) or not bins or any(type(b) is not int or b < 1 for b in bins):
        raise ValueError(f"bins must be a list of positive ints, got {bins!r}")
    shape = (len(bins), channels, 1, 1)
    checks.check_parameters(
        input,
        ("gate_weight", gate_weight, shape, "(number of bins, in_channels, 1, 1)"),
        ("gate_bias", gate_bias, (len(bins),), "(number of bins,)"),
    )
    pooled, gate = _outside_autocast(_gated_pyramid_pool, input, gate_weight, gate_bias, list(bins))
    batch, channels, _ = pooled.shape
    maps = pooled.split([b * b for b in bins], 2)
    return [cells.view(batch, channels, b, b) for cells, b in zip(maps, bins, strict=True)], gate


def _gated_pyramid_pool(
    input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, bins: list[int]
) -> tuple[Tensor, Tensor]:
    operators = _operators("gated_pyramid_pool", input)
    if operators is None or (input.is_cuda and max(bins) > MAX_CUDA_BIN):
        return reference.gated_pyramid_pool(input, gate_weight, gate_bias, bins)
    return operators.gated_pyramid_pool(input, gate_weight, gate_bias, bins)


def _operators(operator: str, input: Tensor) -> Any:
    """The operators (``ops.library.operators``) that take this input; None for the plain functions of ``reference``."""
    return OPERATORS[backends.select_for(operator, input)]


def _outside_autocast(function: Callable, input: Tensor, *arguments: Any) -> Any:
    """``function(input, *arguments)``; under autocast with all tensors cast once, here, to autocast's dtype.

    Left to autocast, ``F.interpolate`` would run in float32: twice the traffic.
    """
    if not checks.autocast_enabled(input.device):
        return function(input, *arguments)
    device_type = input.device.type
    operands = autocast_operands(device_type, (input, *arguments))
    with torch.autocast(device_type, enabled=False):
        return function(*operands)


def scale_transfer(
    input: Tensor,
    *,
    size: Size | None = None,
    scale_factor: ScaleFactor | None = None,
    mode: Mode = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """ST of Eq. 3 without a gate: bilinear or nearest interpolation, or adaptive average pooling (``mode="avg"``).

    Args:
        input: (N, C, H, W), floating point. size, scale_factor, mode, align_corners: as in :func:`gated_scale_transfer`.

    Returns:
        (N, C, H', W') in the dtype of ``input``, under autocast too; ``input`` itself where the size does not change.

    Raises:
        ValueError, TypeError: as :func:`gated_scale_transfer`.
    """
    checks.check_input(input)
    checks.check_mode(mode, align_corners)
    out_size, scale = checks.output_size(input, size, scale_factor)
    if not checks.autocast_enabled(input.device):
        return reference.scale_transfer(input, out_size, mode, align_corners, scale)
    with torch.autocast(input.device.type, enabled=False):
        return reference.scale_transfer(input, out_size, mode, align_corners, scale)
