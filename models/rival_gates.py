"""The gates that the paper compares its own with (arXiv 2005.13363, Table 3): other kinds, other places.

The paper says "channel-wise" or "spatial" gates, "after each block", "after each layer" or "combined with ST", and gives
parameters and GFLOPs to two decimals; it does not print their form. What those numbers (W18-Small-v2) tell:

- Spatial gates combined with ST are GSTO's own, the gates of GFM.
- Spatial gates after each block add 585 to 1404 multiply-adds per pixel at 1/4, but fewer than 1909 parameters. A 1x1
  convolution C -> 1 cannot do that; a 7x7 convolution over the channels' mean and maximum does, once behind every
  branch of every multi-branch module. So that is the form here, and a block is such a module.
- Spatial gates after each layer agree if a layer is a convolution of the stem, of stage 1 or of the branches' residual
  blocks. (Without stem and stage 1 the row would read 72.0 instead of 72.1 GFLOPs.)
- Channel gates are squeeze and excitation. Their reduction does not follow from the numbers: 64 is one that gives all
  three rows with the blocks and layers above.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from .config import Options
from .gates import GatedModule

REDUCTION = 64
KERNEL_SIZE = 7


class ChannelGate(GatedModule):
    """x times one gate per image and channel: sigmoid(conv1x1(ReLU(conv1x1(mean over the pixels of x)))).

    Args:
        channels: C of x; between the convolutions there are C // 64, at least 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // REDUCTION, 1)
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
        )

    def gate_layers(self) -> Iterator[nn.Module]:
        """Yield the one gate."""
        yield self.layers

    def start_gates(self, gate_bias_init: float | None) -> None:
        """As every gate, and with the hidden units on.

        A narrow branch has one or two of them. Started at 0, about half of them would be off for every image: without
        gradient, they stay off, and the gate is a constant.
        """
        super().start_gates(gate_bias_init)
        nn.init.ones_(cast(Tensor, self.layers[1].bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; the recorded gate is (N, C, 1, 1)."""
        gate = torch.sigmoid(self.layers(x))
        if self.gate_recorder is not None:
            self.gate_recorder("", gate)
        return gate * x


class PooledSpatialGate(GatedModule):
    """x times one gate per pixel: sigmoid of a 7x7 convolution over the mean and the maximum over the channels of x.

    Args:
        bias: gives the convolution a learnable bias.
    """

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, KERNEL_SIZE, padding=KERNEL_SIZE // 2, bias=bias)

    def gate_layers(self) -> Iterator[nn.Module]:
        """Yield the one gate."""
        yield self.conv

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; the recorded gate is (N, 1, H, W)."""
        gate = torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))
        if self.gate_recorder is not None:
            self.gate_recorder("", gate)
        return gate * x


def gates_at(position: str, options: Options) -> Callable[[int], nn.Module]:
    """What makes the gate behind a block or layer of so many channels; the identity where the options ask for none.

    Args:
        position: "block" or "layer".
        options: of the network.
    """
    if not options.gated_fusion or options.gate_position != position:
        return nn.Identity
    return ChannelGate if options.gate_kind == "channel" else partial(_pooled_spatial_gate, options)


def _pooled_spatial_gate(options: Options, channels: int) -> nn.Module:
    return PooledSpatialGate(bias=options.gate_bias_init is not None)
