"""Checks of arguments that the networks share; an error names the argument, what was given and what is allowed."""

import math
from typing import Any

import torch
from torch import Tensor

MIN_SIZE = 32  # of an image: the lowest level of every network is at 1/32, or would be without dilation


def check_image(input: Tensor) -> None:
    """Raise unless `input` is a batch of floating-point images (N, 3, H, W) with H, W >= 32."""
    if input.dim() != 4 or input.shape[1] != 3 or input.shape[2] < MIN_SIZE or input.shape[3] < MIN_SIZE:
        raise ValueError(f"input must be (N, 3, H, W) with H, W >= {MIN_SIZE}, got shape {tuple(input.shape)}")
    if not torch.is_floating_point(input):
        raise TypeError(f"input must be floating point, got {input.dtype}")


def check_num_classes(num_classes: Any) -> None:
    """Raise unless `num_classes` is an integer of at least 1."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"num_classes must be an integer, got {num_classes!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")


def check_flags(**flags: Any) -> None:
    """Raise unless all are True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_optional_number(name: str, value: Any) -> None:
    """Raise unless `value` is None or a finite number."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be None or a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")


def check_bn_momentum(value: Any) -> None:
    """Raise unless `value` is None or in (0, 1]."""
    check_optional_number("bn_momentum", value)
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"bn_momentum must be in (0, 1], got {value!r}")
