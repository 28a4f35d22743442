"""The supervised gated transition, GTM (arXiv 2005.13363, Section 3.2.2): how a new branch starts in GSTO-HRNet."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .blocks import concat_upsampled, conv_norm_relu
from .gates import GatedModule


class TransitionGate(GatedModule):
    """The gate of a GTM, computed from the class map P: (N, num_classes, H, W) -> (N, 1, H', W').

    A 3x3 convolution num_classes -> 1, then `stage - 1` stride-2 3x3 convolutions 1 -> 1 that bring the map from 1/4 of
    the image down to the size of the stage's lowest branch, each with BatchNorm and ReLU; then the sigmoid.

    Args:
        num_classes: channels of the class map.
        stage: 2 or 3, the stage after which the transition stands; its lowest branch has index `stage - 1`.
    """

    def __init__(self, num_classes: int, stage: int) -> None:
        super().__init__()
        chain = [conv_norm_relu(num_classes, 1, 3), *(conv_norm_relu(1, 1, 3, stride=2) for _ in range(stage - 1))]
        # The chain's name is the index of the new branch: that is the key layout of the published checkpoints.
        self.layers_name = str(stage)
        self.add_module(self.layers_name, nn.Sequential(*chain))

    def gate_layers(self) -> Iterator[nn.Module]:
        """Yield the one gate."""
        yield self.get_submodule(self.layers_name)

    def forward(self, class_map: Tensor) -> Tensor:
        """Map the class map (N, num_classes, H, W) at 1/4 to the gate (N, 1, H', W')."""
        gate = torch.sigmoid(self.get_submodule(self.layers_name)(class_map))
        if self.gate_recorder is not None:
            self.gate_recorder("", gate)
        return gate


def gated_transition(
    branches: Sequence[Tensor], predictor: nn.Module, gate: nn.Module, new_branch: nn.Module, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Start a new branch from the gated lowest branch.

    Args:
        branches: the stage's outputs (N, C_j, H_j, W_j), highest resolution first.
        predictor: makes the class map P from all branches, upsampled to the first one's size and concatenated.
        gate: a `TransitionGate`.
        new_branch: the layers that halve the size of the lowest branch and double its width.
        align_corners: of the bilinear upsampling.

    Returns:
        The new branch, and the class map (N, num_classes, H_0, W_0) that the auxiliary loss sees.
    """
    class_map = predictor(concat_upsampled(branches, align_corners))
    return new_branch(gate(class_map) * branches[-1]), class_map
