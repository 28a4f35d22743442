"""Whether a network runs its batch norms, sums, upsampling and gates fused, or one PyTorch operator after the other."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class FusedModule(nn.Module):
    """Base of the modules whose batch norms, sums and upsampling run in one pass; `fused` False: one operator after the other."""

    fused: bool = True


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
