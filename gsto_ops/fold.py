"""``fold``: a copy of a network for inference, in which batch norms and supervised gates have become plain weights."""

import copy
from collections import Counter

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parametrize

from .functional import collapse_gate
from .modules import GatedScaleTransfer


def fold(module: nn.Module, *, class_map: bool = False) -> nn.Module:
    """A copy of ``module`` for inference, with the same outputs within rounding.

    - ``GatedScaleTransfer``: the batch norm goes into the projection's weight and bias. A supervised gate becomes
      σ(ρ·F + b') with one vector ρ = W_clsᵀθ (arXiv 2005.13363, Eq. 5), and the class map is not computed any more.
    - a convolution directly followed by its batch norm in an ``nn.Sequential``: the batch norm goes into the convolution.

    Args:
        module: any network, all of it in eval mode; it is not changed. class_map: True keeps the supervised transfers'
            class maps, so that they still return (output, class_map); False (default): they return the output alone.

    Returns:
        The copy, in eval mode.

    Raises:
        ValueError: a part of the module is in training mode. TypeError: not a module.
    """
    folded = inference_copy(module)
    shared = shared_modules(folded)
    for part in list(folded.modules()):
        if isinstance(part, GatedScaleTransfer):
            fold_transfer(part, class_map)
        elif isinstance(part, nn.Sequential):
            fold_sequential(part, shared)
    return folded


def inference_copy(module: nn.Module) -> nn.Module:
    """A deep copy. ValueError where a part is in training mode: its batch statistics are not known yet."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    training = [name or type(part).__name__ for name, part in module.named_modules() if part.training]
    if training:
        raise ValueError(
            f"module must be in eval mode to be folded: call eval() first; in training mode: {', '.join(training[:3])}"
            + (f" and {len(training) - 3} more" if len(training) > 3 else "")
        )
    return copy.deepcopy(module)


def shared_modules(module: nn.Module) -> set[nn.Module]:
    """The modules that have several places in a network: what one place needs, another may not."""
    places = Counter(part for _, part in module.named_modules(remove_duplicate=False))
    return {part for part, count in places.items() if count > 1}


@torch.no_grad()
def fold_transfer(transfer: GatedScaleTransfer, class_map: bool) -> None:
    """In place."""
    if transfer.predictor is not None and not class_map:
        weight, bias = collapse_gate(
            transfer.predictor.weight, transfer.predictor.bias, transfer.gate.weight, transfer.gate.bias
        )
        transfer.gate = convolution(weight, bias)
        transfer.predictor = None
    if (
        transfer.projection is not None
        and transfer.norm is not None
        and is_foldable(transfer.projection, transfer.norm)
    ):
        transfer.projection, transfer.norm = fuse_conv_bn_eval(transfer.projection, transfer.norm), None


def fold_sequential(layers: nn.Sequential, shared: set[nn.Module]) -> None:
    """In place; the place of a batch norm is kept, by an ``nn.Identity``, so that the other layers keep their names."""
    for first, second in zip(list(layers._modules), list(layers._modules)[1:], strict=False):
        fold_pair(layers, first, second, shared)


def fold_pair(parent: nn.Module, conv: str, norm: str, shared: set[nn.Module]) -> None:
    """Folds the batch norm of this name into the convolution of that name, where that can be done. In place."""
    layer, batch_norm = getattr(parent, conv), getattr(parent, norm)
    if is_foldable(layer, batch_norm) and not shared & {layer, batch_norm, parent}:
        setattr(parent, conv, fuse_conv_bn_eval(layer, batch_norm))
        setattr(parent, norm, nn.Identity().eval())


def is_foldable(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether these are a plain convolution and a batch norm with statistics of its own."""
    return (
        type(conv) is nn.Conv2d
        and isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
        and norm.running_mean is not None
        and not parametrize.is_parametrized(conv)
        and not (norm._forward_hooks or conv._forward_hooks)
    )


def convolution(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
    """A 1x1 convolution with these weights, in eval mode."""
    outputs, inputs = weight.shape[:2]
    conv = nn.Conv2d(inputs, outputs, 1, bias=bias is not None, device="meta").eval()
    conv.weight = nn.Parameter(weight.detach().contiguous())
    conv.bias = None if bias is None else nn.Parameter(bias.detach().contiguous())
    return conv
