"""What the options of ``gsto bench`` have in common."""

from __future__ import annotations

import re

import torch

from ..errors import UsageError


def at_least(low: int, **values: int) -> None:
    """Raises UsageError for an option whose value is less than ``low``."""
    for name, value in values.items():
        if value < low:
            raise UsageError(f"--{name} must be at least {low}, got {value}")


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of "512x1024"; at least 32 each, the networks' largest stride."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or min(map(int, match.groups())) < 32:
        raise UsageError(f"--size must be HxW, both at least 32, for example 512x1024; got {text!r}")
    return int(match[1]), int(match[2])


def use_threads(threads: int | None) -> None:
    """Run on so many CPU threads; None leaves torch's choice."""
    if threads is not None:
        at_least(1, threads=threads)
        torch.set_num_threads(threads)
