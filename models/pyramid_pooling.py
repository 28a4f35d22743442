"""The pyramid pooling module (PPM) with gated scale transfers (arXiv 2005.13363, Section 3.3, Fig. 4)."""

from typing import Any

from torch import Tensor, nn

import gsto_ops

from .blocks import conv_norm_relu
from .feature_gates import FeatureHead

BINS = (1, 2, 3, 6)


class PyramidPooling(FeatureHead):
    """PSPNet's head: the feature is pooled to 1x1, 2x2, 3x3 and 6x6, each bin through a gate of its own.

    Every bin is gate, average pooling, 1x1 convolution C -> C/4 with BatchNorm and ReLU, bilinear upsampling; then
    concatenation with the feature, 3x3 convolution with BatchNorm and ReLU, dropout, classifier. The gates and poolings
    of all bins come from one read of the feature, `gsto_ops.gated_pyramid_pool`.

    In training BatchNorm needs at least two images, because a bin of 1x1 has one value per channel and image.

    Args:
        in_channels: channels of the feature, divisible by 4.
        num_classes: channels of the logits.
        align_corners: of the bilinear upsampling.
        options: gate, auxiliary, gate_bias, scale_equalizer; see `FeatureHead`.
    """

    def __init__(self, in_channels: int, num_classes: int, *, align_corners: bool = False, **options: Any) -> None:
        width = in_channels // len(BINS)
        names = [f"bin{b}" for b in BINS]
        levels = [in_channels] + [width] * len(BINS)
        super().__init__(in_channels, num_classes, names=names, levels=levels, hidden=512, kernel_size=3, **options)
        self.align_corners = align_corners
        self.branches = nn.ModuleList(conv_norm_relu(in_channels, width, 1) for _ in BINS)

    def levels(self, feature: Tensor) -> list[Tensor]:
        """The feature and the upsampled bins."""
        size = tuple(feature.shape[-2:])
        maps = [branch(pooled) for branch, pooled in zip(self.branches, self._pool(feature), strict=True)]
        up: dict[str, Any] = {"size": size, "mode": "bilinear", "align_corners": self.align_corners}
        return [feature, *(gsto_ops.scale_transfer(x, **up) for x in maps)]

    def _pool(self, feature: Tensor) -> list[Tensor]:
        if self.gates is None:
            return [gsto_ops.scale_transfer(feature, size=b, mode="avg") for b in BINS]
        pooled, gate = gsto_ops.gated_pyramid_pool(feature, *self.gate_operands(), bins=BINS)
        self.gates.record(gate)
        return pooled
