"""The pieces that HRNet is assembled from: residual blocks, conv-BN(-ReLU) groups and the 1x1 head."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import gsto_ops
from gsto_ops.functional import Mode

from .fused import FusedModule, convolve_norm_relu
from .scale_equalizer import effective_parameters, fusion_conv


class ConvNormReLU(FusedModule, nn.Sequential):
    """A convolution, its norm and ReLU, with the state-dict keys 0 and 1."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H', W')."""
        if not self.fused:
            return super().forward(input)
        conv, norm, _ = self
        return convolve_norm_relu(input, conv, norm)


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1
) -> list[nn.Module]:
    """A convolution without bias that keeps the size (up to its stride), and its BatchNorm."""
    padding = kernel_size // 2 * dilation
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def conv_norm_relu(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1
) -> ConvNormReLU:
    """`conv_norm` followed by ReLU."""
    return ConvNormReLU(*conv_norm(in_channels, out_channels, kernel_size, stride, dilation), nn.ReLU(inplace=True))


class LevelsHead(FusedModule, nn.Sequential):
    """HRNetV2's head and a gated transition's predictor: 1x1 conv, BatchNorm, ReLU, 1x1 conv (both with bias).

    Its input are all branches, upsampled to the size of the first one and concatenated. The first convolution runs on every
    branch at that branch's own resolution, `gsto_ops.projected_sum`.

    Args:
        levels: the channels of each branch, in the order of concatenation.
        num_classes: output channels.
        upsampling: mode and align_corners of the upsampling.
        scale_equalizer: gives the first convolution a scale equalizer, if there are several levels to equalize.
    """

    def __init__(
        self, levels: Sequence[int], num_classes: int, upsampling: Mapping[str, Any], scale_equalizer: bool = False
    ) -> None:
        in_channels = sum(levels)
        super().__init__(
            fusion_conv(levels, in_channels, equalize=scale_equalizer and len(levels) > 1),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, num_classes, 1),
        )
        self.upsampling = dict(upsampling)

    def forward(self, branches: Sequence[Tensor]) -> Tensor:
        """Map the branches (N, C_j, H_j, W_j) to (N, num_classes, H_0, W_0)."""
        if not self.fused:
            return super().forward(concat_upsampled(branches, **self.upsampling))
        fusion, norm, _, classifier = self
        x = gsto_ops.projected_sum(branches, *effective_parameters(cast(nn.Conv2d, fusion)), **self.upsampling)
        return classifier(gsto_ops.norm_sum(None, [x], [norm], activation="relu", inplace=True))


def concat_upsampled(branches: Sequence[Tensor], mode: Mode = "bilinear", align_corners: bool = False) -> Tensor:
    """All branches, upsampled to the size of the first one, concatenated over the channels.

    Args:
        branches: maps (N, C_j, H_j, W_j); the first one has the largest size.
        mode: "bilinear" or "nearest".
        align_corners: as in `torch.nn.functional.interpolate`.

    Returns:
        (N, sum C_j, H_0, W_0).
    """
    if len(branches) == 1:
        return branches[0]
    size = tuple(branches[0].shape[-2:])
    upsampled = [gsto_ops.scale_transfer(x, size=size, mode=mode, align_corners=align_corners) for x in branches[1:]]
    return torch.cat([branches[0], *upsampled], dim=1)


class BasicBlock(FusedModule):
    """Residual block of two 3x3 convolutions with `channels` in and out; the block of HRNet's parallel branches.

    `gate` makes, of the number of channels, what stands behind every convolution (after its ReLU if it has one).
    """

    def __init__(self, channels: int, gate: Callable[[int], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(channels, channels, 3)
        self.conv2, self.bn2 = conv_norm(channels, channels, 3)
        self.gate1, self.gate2 = gate(channels), gate(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        if self.fused and isinstance(self.gate1, nn.Identity):
            x = convolve_norm_relu(input, self.conv1, self.bn1)
            return convolve_norm_relu(x, self.conv2, self.bn2, input)
        x = self.gate1(self.relu(self.bn1(self.conv1(input))))
        return self.relu(self.gate2(self.bn2(self.conv2(x))) + input)


class Bottleneck(FusedModule):
    """Residual block 1x1, 3x3, 1x1 with `4 * planes` channels out; the block of HRNet's stage 1 and of ResNet-50.

    The shortcut is a 1x1 convolution with BatchNorm (`downsample`) when the channel count or the size changes; stride
    and dilation are those of the 3x3 convolution. `gate` makes, of the number of channels, what stands behind every
    convolution of the residual path (after its ReLU if it has one).
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        dilation: int = 1,
        gate: Callable[[int], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        self.conv1, self.bn1 = conv_norm(in_channels, planes, 1)
        self.conv2, self.bn2 = conv_norm(planes, planes, 3, stride, dilation)
        self.conv3, self.bn3 = conv_norm(planes, out_channels, 1)
        self.gate1, self.gate2, self.gate3 = gate(planes), gate(planes), gate(out_channels)
        same = in_channels == out_channels and stride == 1
        self.downsample = nn.Identity() if same else nn.Sequential(*conv_norm(in_channels, out_channels, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, 4 * planes, ceil(H / stride), ceil(W / stride))."""
        if self.fused and isinstance(self.gate1, nn.Identity):
            x = convolve_norm_relu(input, self.conv1, self.bn1)
            x = convolve_norm_relu(x, self.conv2, self.bn2)
            if isinstance(self.downsample, nn.Identity):
                return convolve_norm_relu(x, self.conv3, self.bn3, input)
            conv, norm = self.downsample
            return gsto_ops.norm_sum(None, [self.conv3(x), conv(input)], [self.bn3, norm], activation="relu")
        x = self.gate1(self.relu(self.bn1(self.conv1(input))))
        x = self.gate2(self.relu(self.bn2(self.conv2(x))))
        return self.relu(self.gate3(self.bn3(self.conv3(x))) + self.downsample(input))
