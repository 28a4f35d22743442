"""Whether a network runs its batch norms, sums, upsampling and gates fused, or one PyTorch operator after the other."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

import gsto_ops
from gsto_ops.norm_sum import makes_new_map


class FusedModule(nn.Module):
    """Base of the modules whose batch norms, sums and upsampling run in one pass; `fused` False: one operator after the other."""

    fused: bool = True


def convolve_norm_relu(input: Tensor, conv: nn.Module, norm: nn.Module, residual: Tensor | None = None) -> Tensor:
    """relu(norm(conv(input)) + residual), all behind the convolution in one pass."""
    return gsto_ops.norm_sum(residual, [conv(input)], [norm], activation="relu", inplace=makes_new_map(conv))


@contextmanager
def plain_composition(model: nn.Module) -> Iterator[None]:
    """Run `model` one PyTorch operator after the other while the context is open, so that the hooks of all its modules run."""
    before = {module: module.fused for module in model.modules() if isinstance(module, FusedModule)}
    set_fused(model, False)
    try:
        yield
    finally:
        for module, fused in before.items():
            module.fused = fused


def set_fused(model: nn.Module, fused: bool) -> None:
    """Choose how the modules of `model` run; the numbers are the same within rounding."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.fused = fused
