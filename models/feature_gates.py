"""What PPM and ASPP share: branches that read one feature, each through a gate of its own (arXiv 2005.13363, Fig. 4)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .gates import GatedModule
from .scale_equalizer import fusion_conv

GATES = (None, "unsupervised", "supervised")
DROPOUT = 0.1


class FeatureGates(GatedModule):
    """The gates of all branches, from one 1x1 convolution: `conv` has one output channel per branch.

    Args:
        in_channels: channels of what the gates are computed from: the feature, or its class map if supervised.
        names: one name per branch, for `record_gates`.
        bias: gives the convolution a bias.
    """

    def __init__(self, in_channels: int, names: Sequence[str], bias: bool) -> None:
        super().__init__()
        self.names = tuple(names)
        self.conv = nn.Conv2d(in_channels, len(names), 1, bias=bias)

    def gate_layers(self) -> Iterator[nn.Module]:
        """Yield the convolution of all gates."""
        yield self.conv

    def operands(self, predictor: nn.Conv2d | None) -> tuple[Tensor, Tensor | None]:
        """Weight (K, C, 1, 1) and bias (K,) that make the K gates' logits of the feature itself.

        Supervised gates are σ(θ·P + b) with P = W F + c, so they are σ((θW)·F + θ·c + b): the feature is read once.
        """
        weight, bias = self.conv.weight, self.conv.bias
        if predictor is None:
            return weight, bias
        theta = weight.flatten(1)
        assert predictor.bias is not None
        shift = theta @ predictor.bias
        return (theta @ predictor.weight.flatten(1))[:, :, None, None], shift if bias is None else shift + bias

    def record(self, gate: Tensor) -> None:
        """Give the gates (N, K, H, W) to `record_gates`."""
        if self.gate_recorder is not None:
            for k, name in enumerate(self.names):
                self.gate_recorder(name, gate[:, k : k + 1])


class FeatureHead(nn.Module, ABC):
    """A head of parallel branches: every branch reads the (gated) feature, then concatenation, fusion and classifier.

    Args:
        in_channels: channels C of the feature.
        num_classes: channels of the logits.
        names: the names of the branches.
        levels: the channels of what is concatenated.
        hidden: channels of the fusion, a convolution with BatchNorm, ReLU and dropout.
        kernel_size: of the fusion.
        gate: None, "unsupervised" or "supervised".
        auxiliary: gives the head a light predictor, one 1x1 convolution C -> num_classes, whose class map is an output in
            training; a supervised head has it in any case, because its gates are computed from that class map.
        gate_bias: gives every gate a learnable bias.
        scale_equalizer: puts a scale equalizer in front of the fusion.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        names: Sequence[str],
        levels: Sequence[int],
        hidden: int,
        kernel_size: int,
        gate: str | None,
        auxiliary: bool,
        gate_bias: bool,
        scale_equalizer: bool,
    ) -> None:
        super().__init__()
        self.supervised = gate == "supervised"
        self.predictor = nn.Conv2d(in_channels, num_classes, 1) if auxiliary or self.supervised else None
        self.gates = None
        if gate is not None:
            self.gates = FeatureGates(num_classes if self.supervised else in_channels, names, gate_bias)
        self.fusion = nn.Sequential(
            fusion_conv(levels, hidden, kernel_size, bias=False, equalize=scale_equalizer),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(DROPOUT),
        )
        self.classifier = nn.Conv2d(hidden, num_classes, 1)

    @abstractmethod
    def levels(self, feature: Tensor) -> list[Tensor]:
        """What is concatenated, all at the size of the feature."""

    def forward(self, feature: Tensor) -> list[Tensor]:
        """Map the feature (N, C, H, W) to [logits], and in training with a predictor to [logits, class map].

        All maps are (N, num_classes, H, W).
        """
        logits = self.classifier(self.fusion(torch.cat(self.levels(feature), 1)))
        if self.predictor is None or not self.training:
            return [logits]
        return [logits, self.predictor(feature)]

    def gate_operands(self) -> tuple[Tensor, Tensor | None]:
        """`FeatureGates.operands` of this head's gates."""
        assert self.gates is not None
        return self.gates.operands(self.predictor if self.supervised else None)

    def multiply_adds_saved(self, feature: Tensor) -> int:
        """What the supervised gates' definition (Eq. 4, 5) costs in addition to the folded gates, which is what runs."""
        if self.gates is None or not self.supervised:
            return 0
        gates, classes, channels = len(self.gates.names), self.classifier.out_channels, feature.shape[1]
        return feature[:, 0].numel() * (classes * channels + gates * classes - gates * channels)
