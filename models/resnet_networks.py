"""Segmentation networks on ResNet-50: PSPNet and DeepLabV3 with gated scale transfers, and the RSP head."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .aspp import AtrousPyramid
from .checks import check_bn_momentum, check_flags, check_image, check_num_classes, check_optional_number
from .config import Task
from .feature_gates import GATES, FeatureGates, FeatureHead
from .gates import GatedModule
from .pyramid_pooling import PyramidPooling
from .resnet import ResNet50
from .rsp import RSPHead

_GATE_STD = 0.001  # gates start at their bias


@dataclass(frozen=True)
class PyramidOptions:
    """The options of `pspnet_r50` and `deeplabv3_r50`; a value that is not allowed is an error that names the option.

    Attributes:
        gate: None, "unsupervised" (gates from the feature) or "supervised" (gates from the class map of a predictor on
            the feature, which is an auxiliary output in training).
        output_stride: of the backbone, 8 or 16; the logits have that stride. Default 8.
        auxiliary: the predictor and its auxiliary output without gates that read it (the paper's "w/ sup"); with
            gate="supervised" they are there in any case.
        gate_bias_init: None, or the number that the logit of every gate starts from; 4 starts the gates open at 0.98.
        bn_momentum: of every BatchNorm; None is the task's default (0.01 for segmentation).
        align_corners: of every bilinear upsampling.
        scale_equalizer: a scale equalizer in front of the head's fusion, for `measure_scales`.
    """

    gate: str | None = None
    output_stride: int = 8
    auxiliary: bool = False
    gate_bias_init: float | None = None
    bn_momentum: float | None = None
    align_corners: bool = False
    scale_equalizer: bool = False

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {GATES}, got {self.gate!r}")
        if self.output_stride not in (8, 16):
            raise ValueError(f"output_stride must be 8 or 16, got {self.output_stride!r}")
        flags = ("auxiliary", "align_corners", "scale_equalizer")
        check_flags(**{name: getattr(self, name) for name in flags})
        check_optional_number("gate_bias_init", self.gate_bias_init)
        check_bn_momentum(self.bn_momentum)


@dataclass(frozen=True)
class RSPOptions:
    """The options of `rsp_r50`; a value that is not allowed is an error that names the option.

    Attributes:
        region_size: every pixel attends to region_size x region_size cells of the next higher level; odd. Default 5.
        bn_momentum: of every BatchNorm; None is the task's default (0.01 for segmentation).
    """

    region_size: int = 5
    bn_momentum: float | None = None

    def __post_init__(self) -> None:
        size = self.region_size
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"region_size must be an integer, got {size!r}")
        if size < 1 or size % 2 == 0:
            raise ValueError(f"region_size must be odd and at least 1, got {size}")
        check_bn_momentum(self.bn_momentum)


class ResNetSegmenter(nn.Module):
    """A ResNet-50 backbone and a head.

    State-dict keys are `backbone.` with torchvision's names behind it, and `head.`. Use `create_model` to build one.

    Args:
        head: "ppm" (PSPNet), "aspp" (DeepLabV3) or "rsp".
        num_classes: channels of the logits, at least 1.
        task: the default of BatchNorm's momentum.
        options: `PyramidOptions`, or `RSPOptions` for "rsp".

    Raises:
        TypeError: `num_classes` is not an integer.
        ValueError: `num_classes` is below 1.
    """

    def __init__(self, head: str, num_classes: int, task: Task, options: "PyramidOptions | RSPOptions") -> None:
        super().__init__()
        check_num_classes(num_classes)
        self.options = options
        self.backbone = ResNet50(options.output_stride if isinstance(options, PyramidOptions) else 32)
        self.head = _make_head(head, num_classes, options)
        self._initialise(task)

    def forward(self, input: Tensor) -> Tensor | list[Tensor]:
        """Compute the logit maps of a batch of images.

        Args:
            input: images (N, 3, H, W), floating point, H and W at least 32. In training N is at least 2 for PPM and
                ASPP, whose pooled maps have one value per channel and image.

        Returns:
            In eval mode the logits (N, num_classes, H', W') at the stride of the feature: 8 or 16, for RSP 4. In training
            mode a list: [main], and [main, class map] if the head has a predictor (gate="supervised" or auxiliary), both
            that size. Their loss weights are 1.0 and 0.5, as for the outputs of GSTO-HRNet.

        Raises:
            TypeError: `input` is not floating point.
            ValueError: `input` does not have four dimensions, three channels, and H, W >= 32.
        """
        check_image(input)
        features = self.backbone(input)
        maps = self.head(features[-1] if isinstance(self.head, FeatureHead) else features)
        return maps if self.training else maps[0]

    def _initialise(self, task: Task) -> None:
        momentum = task.bn_momentum if self.options.bn_momentum is None else self.options.bn_momentum
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        for module in self.head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.head.modules():
            if isinstance(module, FeatureGates):
                nn.init.normal_(module.conv.weight, std=_GATE_STD)
            if isinstance(module, GatedModule) and isinstance(self.options, PyramidOptions):
                module.start_gates(self.options.gate_bias_init)


def _make_head(head: str, num_classes: int, options: PyramidOptions | RSPOptions) -> nn.Module:
    if isinstance(options, RSPOptions):
        return RSPHead(ResNet50.channels, num_classes, region_size=options.region_size)
    shared: dict[str, Any] = {
        "gate": options.gate,
        "auxiliary": options.auxiliary,
        "gate_bias": options.gate_bias_init is not None,
        "scale_equalizer": options.scale_equalizer,
    }
    if head == "ppm":
        return PyramidPooling(ResNet50.channels[-1], num_classes, align_corners=options.align_corners, **shared)
    return AtrousPyramid(ResNet50.channels[-1], num_classes, output_stride=options.output_stride, **shared)
