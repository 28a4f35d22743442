"""Atrous spatial pyramid pooling (ASPP) with gated scale transfers (arXiv 2005.13363, Section 3.3, Fig. 4)."""

from typing import Any

from torch import Tensor, nn

import gsto_ops

from .blocks import conv_norm_relu
from .feature_gates import FeatureHead

RATES = {8: (12, 24, 36), 16: (6, 12, 18)}  # by the output stride of the feature
WIDTH = 256


class AtrousPyramid(FeatureHead):
    """DeepLabV3's head: five branches read the feature, each through a gate of its own.

    A 1x1 convolution, three dilated 3x3 convolutions, and global average pooling with a 1x1 convolution and bilinear
    upsampling, each to 256 channels with BatchNorm and ReLU; then concatenation, 1x1 convolution with BatchNorm and
    ReLU, dropout, classifier. All gates come from one convolution.

    In training BatchNorm needs at least two images, because the pooled branch has one value per channel and image.

    Args:
        in_channels: channels of the feature.
        num_classes: channels of the logits.
        output_stride: 16 for dilations 6, 12, 18; 8 for twice as much.
        options: gate, auxiliary, gate_bias, scale_equalizer; see `FeatureHead`.
    """

    def __init__(self, in_channels: int, num_classes: int, *, output_stride: int, **options: Any) -> None:
        rates = RATES[output_stride]
        names = ["conv1x1", *(f"rate{rate}" for rate in rates), "pool"]
        levels = [WIDTH] * len(names)
        super().__init__(in_channels, num_classes, names=names, levels=levels, hidden=WIDTH, kernel_size=1, **options)
        self.branches = nn.ModuleList(
            [
                conv_norm_relu(in_channels, WIDTH, 1),
                *(conv_norm_relu(in_channels, WIDTH, 3, dilation=rate) for rate in rates),
                conv_norm_relu(in_channels, WIDTH, 1),
            ]
        )

    def levels(self, feature: Tensor) -> list[Tensor]:
        """The outputs of the five branches."""
        *inputs, last = self._gated(feature)
        pooled = gsto_ops.scale_transfer(last, size=1, mode="avg")
        maps = [branch(x) for branch, x in zip(self.branches, [*inputs, pooled], strict=True)]
        maps[-1] = gsto_ops.scale_transfer(maps[-1], size=tuple(feature.shape[-2:]), mode="bilinear")
        return maps

    def _gated(self, feature: Tensor) -> list[Tensor]:
        if self.gates is None:
            return [feature] * len(self.branches)
        split = gsto_ops.gated_split(feature, *self.gate_operands(), copies=len(self.branches))
        self.gates.record(split.gate)
        return split.gated
