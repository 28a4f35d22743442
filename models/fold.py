"""``fold``: a network for inference, its batch norms, scale equalizers and supervised gates turned into plain weights."""

from torch import nn

from gsto_ops.fold import convolution, fold_pair, fold_sequential, fold_transfer, inference_copy, shared_modules
from gsto_ops.modules import GatedScaleTransfer

from .config import TRANSITION_STAGES
from .feature_gates import FeatureHead
from .gated_fusion import MultiBranchModule
from .gates import GATE_FORMS
from .hrnet import HRNet
from .scale_equalizer import EqualizedConv2d, fold_scales


def fold(model: nn.Module) -> nn.Module:
    """A copy of a network for inference, with the same output within rounding, and less to compute.

    Batch norms go into the convolutions in front of them. The supervised gates of PPM, ASPP and paper-form transitions become one
    vector each (arXiv 2005.13363, Eq. 5); the predictors, whose class maps nobody asks for in inference, are gone.

    Args:
        model: a network of this package in eval mode. Not changed.

    Returns:
        The copy, in eval mode. It has no use in training, and the keys of its state dict are its own.

    Raises:
        ValueError: the model is in training mode. TypeError: not a module.
    """
    folded = inference_copy(model)
    if any(isinstance(part, EqualizedConv2d) for part in folded.modules()):
        fold_scales(folded)
    shared = shared_modules(folded)
    if isinstance(folded, HRNet):
        _drop_unread_predictors(folded)
    kept = {layer for part in folded.modules() for layer in _norms_applied_by_sums(part)}
    for part in list(folded.modules()):
        if part in kept:
            continue
        if isinstance(part, GatedScaleTransfer):
            fold_transfer(part, class_map=False)
        elif isinstance(part, FeatureHead):
            _fold_gates(part)
        if isinstance(part, nn.Sequential):
            fold_sequential(part, shared)
        for name, _ in list(part.named_children()):
            if name.startswith("conv") and hasattr(part, norm := name.replace("conv", "bn")):
                fold_pair(part, name, norm, shared)
    return folded


def _norms_applied_by_sums(part: nn.Module) -> list[nn.Module]:
    """The layers of a gated fusion that runs as one operator: it multiplies by the gate in between a convolution and its norm,
    where a bias cannot be, and applies the norms while it adds, at no cost."""
    if not isinstance(part, MultiBranchModule) or not getattr(part, "fused", False):
        return []
    if part.att_layers is None or part.gate_form not in GATE_FORMS:
        return []
    return [*part.fuse_layers.modules(), *part.att_layers.modules()]


def _drop_unread_predictors(model: HRNet) -> None:
    """The class maps that are for an auxiliary loss alone."""
    for stage in TRANSITION_STAGES:
        if getattr(model, f"att{stage}") is None or not model.options.transition_supervision:
            setattr(model, f"last_layer_stage{stage}", None)


def _fold_gates(head: FeatureHead) -> None:
    if head.gates is not None and head.supervised:
        head.gates.conv = convolution(*head.gate_operands())
        head.supervised = False
    head.predictor = None
