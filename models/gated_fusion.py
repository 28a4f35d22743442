"""The multi-branch module of HRNet with its fusion: plain (HRNetV2) or gated (GFM; arXiv 2005.13363, Section 3.2.1)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gsto_ops

from .blocks import BasicBlock, conv_norm, conv_norm_relu
from .config import Options
from .fused import FusedModule
from .gates import GATE_FORMS, GatedModule
from .rival_gates import ChannelGate, gates_at


class MultiBranchModule(GatedModule, FusedModule):
    """Parallel branches of residual blocks, then fusion of every branch j into every branch i.

    Fusion is y_i = ReLU(sum_j transfer_ij(g_ij * x_j)), where the transfer is
    - j > i: 1x1 convolution C_j -> C_i, BatchNorm, upsampling to the size of x_i (bilinear or nearest);
    - j = i: the identity;
    - j < i: i - j stride-2 3x3 convolutions with BatchNorm, and ReLU after all but the last one;
    and the gate g_ij (N, 1, H_j, W_j), one scalar per pixel (Eq. 4), is
    - absent with `gated_fusion=False`, which is HRNetV2, and with gates after blocks or layers;
    - sigmoid(conv1x1(x_j)) with `gate_form="paper"`;
    - sigmoid(ReLU(BatchNorm(conv1x1(x_j)))) with `gate_form="released"`, so never below 0.5;
    - a `ChannelGate` of x_j, (N, C_j, 1, 1), with `gate_kind="channel"`.

    Args:
        channels: the width of each branch, highest resolution first.
        blocks: residual blocks per branch.
        options: of the network.
        outputs: how many branches, highest resolution first, get an output; None is all.
    """

    # Nested nn.ModuleLists, indexed by [target][source]; their items have no static types.
    fuse_layers: Any
    att_layers: Any

    def __init__(self, channels: Sequence[int], blocks: int, options: Options, outputs: int | None = None) -> None:
        super().__init__()
        self.gate_form = options.gate_form if options.gate_kind == "spatial" else options.gate_kind
        self.upsampling: dict[str, Any] = {"mode": options.upsampling, "align_corners": options.align_corners}
        sources = range(len(channels))
        targets = sources[:outputs]
        layer_gate, block_gate = gates_at("layer", options), gates_at("block", options)
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(c, layer_gate) for _ in range(blocks))) for c in channels
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_transfer_layers(channels, target, source) for source in sources) for target in targets
        )
        self.att_layers = None
        if options.gated_fusion and options.gate_position == "transfer":
            self.att_layers = nn.ModuleList(nn.ModuleList(_gate_layers(c, options) for c in channels) for _ in targets)
        self.block_gates = nn.ModuleList(block_gate(channels[target]) for target in targets)

    def gate_layers(self) -> Iterator[nn.Module]:
        """Yield the gates of every pair (target, source) that this module computes itself."""
        if self.gate_form != "channel":
            for row in self.att_layers or ():
                yield from row

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Map one tensor (N, C_j, H_j, W_j) per branch to a list of the same shapes (its first `outputs` ones)."""
        x = [branch(input) for branch, input in zip(self.branches, inputs, strict=True)]
        if self.fused and (self.att_layers is None or self.gate_form in GATE_FORMS):
            fusion = x, self.fuse_layers, self.att_layers
            if self.gate_recorder is None:
                sums = gsto_ops.gated_fusion(*fusion, **self.upsampling)
            else:
                sums, gates = gsto_ops.gated_fusion(*fusion, **self.upsampling, return_gate=True)
                for target, row in enumerate(gates):
                    for source, gate in enumerate(row):
                        self.gate_recorder(f"att_layers.{target}.{source}", gate)
            return [block_gate(y) for block_gate, y in zip(self.block_gates, sums, strict=True)]
        outputs = []
        for target, block_gate in enumerate(self.block_gates):
            total = self._transfer(x, target, 0)
            for source in range(1, len(x)):
                total = total + self._transfer(x, target, source)
            outputs.append(block_gate(torch.relu(total)))
        return outputs

    def _transfer(self, x: Sequence[Tensor], target: int, source: int) -> Tensor:
        layers = self.fuse_layers[target][source]
        if source <= target:
            return layers(self._gated(x[source], target, source))
        conv, norm = layers
        up = {"size": tuple(x[target].shape[-2:]), **self.upsampling}
        if self.att_layers is not None and self.gate_form == "paper":
            gate = self.att_layers[target][source]
            if self.gate_recorder is not None:
                self.gate_recorder(f"att_layers.{target}.{source}", torch.sigmoid(gate(x[source])))
            return gsto_ops.gated_norm_transfer(x[source], gate[0].weight, gate[0].bias, conv, norm, **up)
        return gsto_ops.scale_transfer(norm(conv(self._gated(x[source], target, source))), **up)

    def _gated(self, x: Tensor, target: int, source: int) -> Tensor:
        """The gate of this pair, if there is one, times x."""
        if self.att_layers is None:
            return x
        layers = self.att_layers[target][source]
        if self.gate_form == "channel":
            return layers(x)
        if self.gate_form == "paper":
            weight, bias = layers[0].weight, layers[0].bias
            output, gate = gsto_ops.gated_scale_transfer(x, weight, bias, scale_factor=1, return_gate=True)
        else:
            gate = torch.sigmoid(layers(x))
            output = gate * x
        if self.gate_recorder is not None:
            self.gate_recorder(f"att_layers.{target}.{source}", gate)
        return output


def _transfer_layers(channels: Sequence[int], target: int, source: int) -> nn.Module:
    """The layers that bring branch `source` to the width of branch `target` (and down to its size)."""
    c_in, c_out = channels[source], channels[target]
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(*conv_norm(c_in, c_out, 1))
    steps = [conv_norm_relu(c_in, c_in, 3, stride=2) for _ in range(target - source - 1)]
    return nn.Sequential(*steps, nn.Sequential(*conv_norm(c_in, c_out, 3, stride=2)))


def _gate_layers(channels: int, options: Options) -> nn.Module:
    """The layers of one gate's logit (N, channels, H, W) -> (N, 1, H, W), or a `ChannelGate`."""
    if options.gate_kind == "channel":
        return ChannelGate(channels)
    if options.gate_form == "paper":
        return nn.Sequential(nn.Conv2d(channels, 1, 1, bias=options.gate_bias_init is not None))
    return conv_norm_relu(channels, 1, 1)
