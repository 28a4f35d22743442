"""The gated transition, GTM (arXiv 2005.13363, Section 3.2.2): how a new branch starts in GSTO-HRNet.

Both forms start from U, all branches upsampled to 1/4 and concatenated, and come supervised (a class map P of U is an
output for an auxiliary loss, and the gate reads P) or unsupervised (the gate reads U):

| form | supervised gate | unsupervised gate | new branch |
| --- | --- | --- | --- |
| "released" | chain(conv3x3(P)) | chain(conv1x1(U)) | conv3x3, stride 2, of gate * lowest branch |
| "paper" | sigmoid(conv1x1(P)) | sigmoid(conv1x1(U)) | average pooling of conv1x1(gate * U) |

"released" is what the published checkpoints and the paper's tables have, "paper" is the text of Section 3.2.2: one gated
scale transfer. In "released" P = conv1x1(ReLU(BatchNorm(conv1x1(U)))), the gate's convolutions have BatchNorm and ReLU,
and the chain goes on with stride-2 convolutions down to the lowest branch's size and ends in the sigmoid; in "paper"
P = conv1x1(U). The new branch's convolution has BatchNorm and ReLU in both.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import gsto_ops

from .blocks import concat_upsampled, conv_norm_relu
from .fused import FusedModule
from .gates import GatedModule


class TransitionGate(GatedModule, FusedModule):
    """The gate of a released-form GTM: maps with in_channels together, the first one at 1/4 of the image -> (N, 1, H', W').

    A convolution in_channels -> 1, then `stage - 1` stride-2 3x3 convolutions 1 -> 1 that bring the map from 1/4 of
    the image down to the size of the stage's lowest branch, each with BatchNorm and ReLU; then the sigmoid.

    Args:
        in_channels: channels of what the gate reads: the class map P, or U.
        stage: 1, 2 or 3, the stage after which the transition stands; its lowest branch has index `stage - 1`.
        kernel_size: of the first convolution: 3 on P, 1 on U.
        upsampling: mode and align_corners of what makes U of the branches.
    """

    def __init__(self, in_channels: int, stage: int, kernel_size: int, upsampling: Mapping[str, Any]) -> None:
        super().__init__()
        self.upsampling = dict(upsampling)
        shrinking = (conv_norm_relu(1, 1, 3, stride=2) for _ in range(stage - 1))
        # The chain's name is the index of the new branch: that is the key layout of the published checkpoints.
        self.layers_name = str(stage)
        self.add_module(self.layers_name, nn.Sequential(conv_norm_relu(in_channels, 1, kernel_size), *shrinking))

    def gate_layers(self) -> Iterator[nn.Module]:
        """Yield the one gate."""
        yield self.get_submodule(self.layers_name)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Map [P], or the branches that U is made of, to the gate (N, 1, H', W')."""
        first, *shrinking = cast(Any, self.get_submodule(self.layers_name))
        if self.fused and len(levels) > 1:
            logit = gsto_ops.projected_sum(levels, first[0].weight, **self.upsampling)
            logit = gsto_ops.norm_sum(None, [logit], [first[1]], activation="relu", inplace=True)
        else:
            logit = first(concat_upsampled(levels, **self.upsampling))
        for layers in shrinking:
            logit = layers(logit)
        gate = torch.sigmoid(logit)
        if self.gate_recorder is not None:
            self.gate_recorder("", gate)
        return gate


class TransitionTransfer(GatedModule):
    """A paper-form GTM: the gated scale transfer of all levels to the new branch's width and, by pooling, its size.

    Args:
        in_channels: channels of U.
        out_channels: channels of the new branch.
        num_classes: channels of the class map; None for the unsupervised form.
        gate_bias_init: None or the first bias of the gate; see `gsto_ops.GatedScaleTransfer`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_classes: int | None, gate_bias_init: float | None
    ) -> None:
        super().__init__()
        self.transfer = gsto_ops.GatedScaleTransfer(
            in_channels, out_channels, mode="avg", num_classes=num_classes, gate_bias_init=gate_bias_init
        )

    def gate_layers(self) -> Iterator[nn.Module]:
        """Yield the one gate."""
        yield self.transfer.gate

    def forward(self, levels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Map U (N, in_channels, H, W) to the new branch (N, out_channels, *size) and the class map, if there is one."""
        if self.gate_recorder is not None:
            predictor = self.transfer.predictor
            source = levels if predictor is None else predictor(levels)
            self.gate_recorder("", torch.sigmoid(self.transfer.gate(source)))
        output = self.transfer(levels, size=size)
        return output if isinstance(output, tuple) else (output, None)

    def multiply_adds_saved(self, levels: Tensor) -> int:
        """What a supervised gate's definition (Eq. 5) costs in addition to the folded gate, which reads U and not P."""
        predictor = self.transfer.predictor
        return 0 if predictor is None else levels[:, 0].numel() * (predictor.out_channels - levels.shape[1])
