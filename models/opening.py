"""Gates put into a trained HRNet, without changing what it computes."""

import math
from typing import cast

import torch
from torch import nn

from .blocks import BasicBlock
from .config import TRANSITION_STAGES
from .gated_fusion import MultiBranchModule
from .hrnet import HRNet


@torch.no_grad()
def absorb_initial_gates(model: HRNet) -> None:
    """Rescale the weights of a plain HRNetV2, loaded into a gated network, so that its output stays the same.

    Gates start at g = sigmoid(gate_bias_init), and every module's output is smaller by it. Even 0.98 (a bias of 4) adds
    up over the modules: a trained W18-Small-v2 with gates put in as they are has logits that differ by 11 %, and 3 % of
    its pixels change class. Everything between the gates is homogeneous up to BatchNorm, so a factor that comes into a
    convolution can be divided out of its weights, and BatchNorm's weight and bias can give the factor that the branch
    around it has. The output then differs only as far as gates differ from g: on that network by less than 0.5 % for a
    bias of 4, with fewer than one pixel in a thousand changing class. (In training mode this holds for gates without
    BatchNorm: a BatchNorm spreads the logits of its gate to unit variance as soon as it sees a batch.)

    Call it once, after the weights are loaded and before any training step, on a model whose gates are fresh.

    Args:
        model: a network from `create_model` that got the weights of the same network without gates, for example with
            `model.load_state_dict(hrnet.state_dict(), strict=False)`. Changed in place.

    Raises:
        ValueError: gates after blocks or layers, or paper-form transitions, which replace layers of the plain network.
    """
    options = model.options
    if options.gated_fusion and options.gate_position != "transfer":
        raise ValueError(f"only gates with gate_position='transfer' can be absorbed, got {options.gate_position!r}")
    if options.gated_transition and options.transition_form != "released":
        raise ValueError(
            f"transition_form={options.transition_form!r} replaces the convolutions that start HRNet's branches, so the "
            f"network cannot start out as that HRNet; only 'released' gated transitions can be absorbed"
        )
    gate = 1 / (1 + math.exp(-(options.gate_bias_init or 0.0)))
    fusion = gate if options.gated_fusion else 1.0
    scale = 1.0  # of all branches, relative to the network without gates
    for stage in TRANSITION_STAGES:
        new_branch = cast(nn.ModuleList, model.get_submodule(f"transition{stage}"))[-1]
        _rescale(new_branch, scale * (gate if stage in options.gated_transition else 1.0), scale)
        for module in model.get_submodule(f"stage{stage + 1}").children():
            _rescale_module(cast(MultiBranchModule, module), scale, fusion * scale)
            scale *= fusion
    _first_conv(model.head).weight.div_(scale)


def _rescale_module(module: MultiBranchModule, scale_in: float, scale_out: float) -> None:
    for block in module.branches.modules():
        if isinstance(block, BasicBlock):
            _rescale(block, scale_in, scale_in)
    for target, row in enumerate(module.fuse_layers):
        for source, layers in enumerate(row):
            if source != target:
                _rescale(layers, scale_out, scale_out)


def _rescale(layers: nn.Module, scale_in: float, scale_out: float) -> None:
    """Let a chain of convolutions and BatchNorms take its input times scale_in and give its output times scale_out."""
    last = [layer for layer in layers.modules() if isinstance(layer, nn.BatchNorm2d)][-1]
    _first_conv(layers).weight.div_(scale_in)
    last.weight.mul_(scale_out)
    last.bias.mul_(scale_out)


def _first_conv(layers: nn.Module) -> nn.Conv2d:
    return next(layer for layer in layers.modules() if isinstance(layer, nn.Conv2d))
