"""ResNet-50 as a backbone: strides replaced by dilation at will, with torchvision's state-dict keys."""

from torch import Tensor, nn

from .blocks import Bottleneck, conv_norm

OUTPUT_STRIDES = (8, 16, 32)
_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # planes and blocks of layer1 ... layer4


class ResNet50(nn.Module):
    """ResNet-50 without its classifier (stride on the 3x3 convolution of a block, as torchvision has it).

    Where the stride of a stage is dropped, its convolutions are dilated instead: the output of the dilated network,
    subsampled, is the output of the network with all its strides.

    Args:
        output_stride: how much smaller than the image the last feature is: 8, 16 or 32.

    Raises:
        ValueError: another output stride.
    """

    channels = tuple(planes * Bottleneck.expansion for planes, _ in _STAGES)

    def __init__(self, output_stride: int = 32) -> None:
        super().__init__()
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride must be one of {OUTPUT_STRIDES}, got {output_stride!r}")
        self.conv1, self.bn1 = conv_norm(3, 64, 7, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels, total_stride, dilation = 64, 4, 1
        layers = []
        for stage, (planes, count) in enumerate(_STAGES):
            stride = 1 if stage == 0 else 2
            first_dilation = dilation  # the block that would have had the stride sees the grid of the stage before
            if total_stride * stride > output_stride:
                dilation, stride = dilation * stride, 1
            total_stride *= stride
            blocks = [Bottleneck(in_channels, planes, stride, first_dilation)]
            in_channels = planes * Bottleneck.expansion
            blocks += [Bottleneck(in_channels, planes, dilation=dilation) for _ in range(count - 1)]
            layers.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Tensor) -> list[Tensor]:
        """Map images (N, 3, H, W) to the outputs of layer1 ... layer4: 256, 512, 1024 and 2048 channels.

        The first one is at a quarter of the image, each further one at half the size of the one before until
        `output_stride` is reached; odd sizes are rounded up.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(input))))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features
