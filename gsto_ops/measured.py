"""Which backend is the fastest for a call, where that has been measured: the shipped table, and the user's own.

``backends`` takes the first backend that can run a call: CUDA before Triton, compiled C++ before plain PyTorch. An entry says
otherwise for one architecture, operator, dtype, layout and size. :func:`remember` writes entries of the user's table, a file of
the user's cache like that of Triton's autotuning; they come before those shipped here.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import layout_of
from .tables import Table

BACKENDS = ("cuda", "triton", "cpu", "reference")
# Key -> backend, with the machine in a comment. None yet: on a CPU the compiled operators lose to plain PyTorch only where a
# float32 gate acts alone, at its own size and without gradients (0.5 - 1.3 x eager, benchmarks/kernels/NOTES.md), and such a call
# shares its entry with those that have a projection, 2 x faster than eager. GPUs have not been measured.
SHIPPED: dict[str, str] = {}


class Call(NamedTuple):
    """What an entry may depend on."""

    architecture: str  # "sm_90", or the instruction set of the CPU kernels
    operator: str
    dtype: str
    layout: str
    size: int  # elements of the input: the power of two that is not above them

    @property
    def key(self) -> str:
        return " ".join(map(str, self))


def call_of(architecture: str, operator: str, input: Tensor) -> Call:
    layout = "channels_last" if layout_of(input) == torch.channels_last else "contiguous"
    size = 1 << max(0, input.numel().bit_length() - 1)
    return Call(architecture, operator, str(input.dtype).removeprefix("torch."), layout, size)


TABLE = Table("backends.json", "choices of a backend", lambda value: value in BACKENDS)


@cache
def choices() -> dict[str, str]:
    """The entries by key, read once: the user's before the shipped ones."""
    return {**SHIPPED, **TABLE.read()}


def remember(call: Call, backend: str) -> None:
    """Writes an entry of the user's table, for this and later processes.

    Raises:
        ValueError: not a backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    TABLE.write(call.key, backend)
    choices()[call.key] = backend
