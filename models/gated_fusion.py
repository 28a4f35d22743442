"""The multi-branch module of HRNet with its fusion: plain (HRNetV2) or gated (GFM; arXiv 2005.13363, Section 3.2.1)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gsto_ops

from .blocks import BasicBlock, conv_norm, conv_norm_relu
from .gates import GatedModule


class MultiBranchModule(GatedModule):
    """Parallel branches of residual blocks, then fusion of every branch j into every branch i.

    Fusion is y_i = ReLU(sum_j transfer_ij(g_ij * x_j)), where the transfer is
    - j > i: 1x1 convolution C_j -> C_i, BatchNorm, bilinear upsampling to the size of x_i;
    - j = i: the identity;
    - j < i: i - j stride-2 3x3 convolutions with BatchNorm, and ReLU after all but the last one;
    and the gate g_ij (N, 1, H_j, W_j), one scalar per pixel (Eq. 4), is
    - absent with `gated=False`, which is HRNetV2;
    - sigmoid(conv1x1(x_j)) with `gate_form="paper"`;
    - sigmoid(ReLU(BatchNorm(conv1x1(x_j)))) with `gate_form="released"`, so never below 0.5.

    Args:
        channels: the width of each branch, highest resolution first.
        blocks: residual blocks per branch.
        gated: whether the gates exist.
        gate_form: "paper" or "released".
        gate_bias: gives the convolution of the paper form a learnable bias (the released form has BatchNorm's).
        align_corners: of the bilinear upsampling.
    """

    # Nested nn.ModuleLists, indexed by [target][source]; their items have no static types.
    fuse_layers: Any
    att_layers: Any

    def __init__(
        self,
        channels: Sequence[int],
        blocks: int,
        *,
        gated: bool = False,
        gate_form: str = "paper",
        gate_bias: bool = False,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.gate_form = gate_form
        self.align_corners = align_corners
        indices = range(len(channels))
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(c) for _ in range(blocks))) for c in channels)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_transfer_layers(channels, target, source) for source in indices) for target in indices
        )
        self.att_layers = None
        if gated:
            self.att_layers = nn.ModuleList(
                nn.ModuleList(_gate_layers(c, gate_form, gate_bias) for c in channels) for _ in indices
            )

    def gate_layers(self) -> Iterator[nn.Module]:
        """Yield the gates of every pair (target, source); none if the module is not gated."""
        for row in self.att_layers or ():
            yield from row

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Map one tensor (N, C_j, H_j, W_j) per branch to a list of the same shapes."""
        x = [branch(input) for branch, input in zip(self.branches, inputs, strict=True)]
        outputs = []
        for target in range(len(x)):
            total = self._transfer(x, target, 0)
            for source in range(1, len(x)):
                total = total + self._transfer(x, target, source)
            outputs.append(torch.relu(total))
        return outputs

    def _transfer(self, x: Sequence[Tensor], target: int, source: int) -> Tensor:
        layers = self.fuse_layers[target][source]
        if source <= target:
            return layers(self._gated(x[source], target, source))
        conv, norm = layers
        projected = norm(self._gated(x[source], target, source, conv))
        size = tuple(x[target].shape[-2:])
        return gsto_ops.scale_transfer(projected, size=size, mode="bilinear", align_corners=self.align_corners)

    def _gated(self, x: Tensor, target: int, source: int, conv: nn.Conv2d | None = None) -> Tensor:
        """The gate of this pair, if there is one, times x, and then the projection `conv`, if there is one."""
        if self.att_layers is None:
            return x if conv is None else conv(x)
        layers = self.att_layers[target][source]
        if self.gate_form == "released":
            gate = torch.sigmoid(layers(x))
            output = gate * x if conv is None else conv(gate * x)
        else:
            weight = None if conv is None else conv.weight
            output, gate = gsto_ops.gated_scale_transfer(
                x, layers[0].weight, layers[0].bias, weight, scale_factor=1, return_gate=True
            )
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


def _gate_layers(channels: int, gate_form: str, gate_bias: bool) -> nn.Sequential:
    """The layers of one gate's logit (N, channels, H, W) -> (N, 1, H, W)."""
    if gate_form == "paper":
        return nn.Sequential(nn.Conv2d(channels, 1, 1, bias=gate_bias))
    return conv_norm_relu(channels, 1, 1)
