"""Argument checks of the public functions: each error names the argument, what was given and what is allowed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MODES = ("bilinear", "avg", "nearest")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# All other parameters may be None where a function allows it.
REQUIRED = ("gate_weight", "class_weight", "scale", "shift")

Size = int | Sequence[int]
ScaleFactor = float | Sequence[float]


def autocast_enabled(device: torch.device) -> bool:
    """Whether tensors of this device are under autocast; False for devices without it, such as meta."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def check_input(input: Tensor, name: str = "input") -> torch.Size:
    """The shape of ``input``, a dense (N, C, H, W) floating-point tensor with C, H, W > 0."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(input).__name__}")
    shape = input.shape
    if len(shape) != 4:
        raise ValueError(f"{name} must have 4 dimensions (N, C, H, W), got {len(shape)} with shape {tuple(shape)}")
    if input.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name} must be a floating-point tensor ({allowed}), got {input.dtype}")
    if input.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {input.layout}")
    if 0 in shape and 0 in shape[1:]:
        raise ValueError(f"{name} must have at least one channel, row and column, got shape {tuple(shape)}")
    return shape


def check_parameter(
    name: str,
    parameter: Tensor | None,
    shape: tuple[int | None, ...],
    input: Tensor,
    *,
    meaning: str,
    dtype: torch.dtype | None = None,
) -> None:
    """``parameter`` has this shape (None: any size > 0), the input's device, this dtype; or it is None and not in ``REQUIRED``.

    Without ``dtype`` it must have the input's dtype, except under autocast, which casts both.
    """
    if parameter is None and name not in REQUIRED:
        return
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {None if parameter is None else type(parameter).__name__}")
    given = parameter.shape
    fits = len(given) == len(shape) and all(
        actual == wanted if wanted is not None else actual > 0 for actual, wanted in zip(given, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        allowed = f"({sizes},)" if len(shape) == 1 else f"({sizes})"
        raise ValueError(
            f"{name} must have shape {allowed}, {meaning}, got {tuple(given)} for input of shape {tuple(input.shape)}"
        )
    if parameter.device != input.device:
        raise ValueError(f"{name} must be on the device of input, {input.device}, got {parameter.device}")
    if not parameter.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {parameter.dtype}")
    if dtype is not None:
        if parameter.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} where input is {input.dtype}, got {parameter.dtype}")
    elif parameter.dtype != input.dtype and not autocast_enabled(input.device):
        raise TypeError(
            f"{name} must have the dtype of input, {input.dtype}, got {parameter.dtype} (or use torch.autocast)"
        )


def check_parameters(
    input: Tensor,
    *parameters: tuple[str, Tensor | None, tuple[int | None, ...], str],
    dtype: torch.dtype | None = None,
) -> None:
    """:func:`check_parameter` of (name, parameter, shape, meaning) each, in less time where nothing is wrong."""
    wanted, device = dtype or input.dtype, input.device
    for name, parameter, shape, meaning in parameters:
        if parameter is None and name not in REQUIRED:
            continue
        if isinstance(parameter, Tensor) and parameter.dtype is wanted and parameter.device == device:
            given = parameter.shape
            if given == shape:
                continue
            if shape[0] is None and len(given) == len(shape) and given == (given[0], *shape[1:]) and given[0] > 0:
                continue
        check_parameter(name, parameter, shape, input, meaning=meaning, dtype=dtype)


def check_projection(weight: Tensor | None, bias: Tensor | None, input: Tensor) -> None:
    if weight is None:
        if bias is not None:
            given = f"shape {tuple(bias.shape)}" if isinstance(bias, Tensor) else repr(bias)
            raise ValueError(f"bias belongs to the projection: it must be None where weight is None, got {given}")
        return
    weights = ("weight", weight, (None, input.shape[1], 1, 1), "(out_channels, in_channels, 1, 1)")
    if bias is None:
        check_parameters(input, weights)
    else:
        out_channels = weight.shape[:1] if isinstance(weight, Tensor) else ()
        check_parameters(input, weights, ("bias", bias, out_channels, "(out_channels,)"))


def check_mode(mode: str, align_corners: bool) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners must be a bool, got {align_corners!r}")
    if align_corners and mode != "bilinear":
        raise ValueError(f"align_corners=True is for mode='bilinear' only, got mode={mode!r}")


def check_activation(activation: str | None) -> str:
    """The operators' name for it: "none" or "relu"."""
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be 'relu' or None, got {activation!r}")
    return activation or "none"


def as_size(size: Size, name: str = "size") -> tuple[int, int]:
    """(H', W') of an int or a pair of ints, all > 0."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) == 2 and type(pair[0]) is int and type(pair[1]) is int and pair[0] > 0 and pair[1] > 0:
        return pair
    allowed = "a positive int or a pair of positive ints (H', W')"
    if len(pair) != 2:
        raise ValueError(f"{name} must be {allowed}, got {size!r}")
    for value in pair:
        if isinstance(value, (bool, float)) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be {allowed}, got {size!r}")
        if value <= 0:
            raise ValueError(f"{name} must be {allowed}, got {size!r}")
    return pair


def as_scale(scale_factor: ScaleFactor, name: str = "scale_factor") -> tuple[float, float]:
    """(scale of H, scale of W) of a number or a pair of numbers, all > 0 and finite."""
    if type(scale_factor) in (int, float) and 0 < scale_factor < math.inf:  # type: ignore[operator]
        return float(scale_factor), float(scale_factor)  # type: ignore[arg-type]
    pair = tuple(scale_factor) if isinstance(scale_factor, (tuple, list)) else (scale_factor, scale_factor)
    allowed = "a positive number or a pair of positive numbers (of H, of W)"
    if len(pair) != 2:
        raise ValueError(f"{name} must be {allowed}, got {scale_factor!r}")
    for value in pair:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be {allowed}, got {scale_factor!r}")
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be {allowed}, got {scale_factor!r}")
    return float(pair[0]), float(pair[1])


def output_size(
    input: Tensor, size: Size | None, scale_factor: ScaleFactor | None
) -> tuple[tuple[int, int], tuple[float, float] | None]:
    """((H', W'), the scale factors if they were given) from exactly one of ``size`` and ``scale_factor``."""
    if size is not None and scale_factor is not None:
        raise ValueError(f"give size or scale_factor, not both: got size={size!r} and scale_factor={scale_factor!r}")
    if size is not None:
        return as_size(size), None
    if scale_factor is None:
        raise ValueError(
            "one of size and scale_factor must be given (scale_factor=1 keeps the size), got None for both"
        )
    scale = as_scale(scale_factor)
    _, _, height, width = input.shape
    if scale == (1.0, 1.0):
        return (height, width), None
    height, width = math.floor(height * scale[0]), math.floor(width * scale[1])
    if height <= 0 or width <= 0:
        raise ValueError(
            f"scale_factor={scale_factor!r} makes an empty output of {height} x {width} from input of shape {tuple(input.shape)}"
        )
    return (height, width), scale
