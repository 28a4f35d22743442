"""HRNetV2 and GSTO-HRNet (arXiv 2005.13363, Section 3.2 and Fig. 3): one trunk, with the gates as options."""

import torch
from torch import Tensor, nn

from .blocks import Bottleneck, concat_upsampled, conv_norm, conv_norm_relu, head
from .config import Options, Task, Trunk
from .gated_fusion import MultiBranchModule
from .gated_transition import TransitionGate, gated_transition
from .gates import GatedModule

MIN_SIZE = 32  # the lowest branch is at 1/32 of the image


class HRNet(nn.Module):
    """HRNetV2, or GSTO-HRNet if the options ask for gates.

    A stem of two stride-2 convolutions, stage 1 of bottlenecks, then stages 2, 3 and 4 with 2, 3 and 4 parallel
    branches at 1/4, 1/8, 1/16 and 1/32 of the image, and a head on all branches, upsampled to 1/4 and concatenated.
    State-dict keys are those of the published HRNet and GSTO checkpoints. Use `create_model` to build one by name.

    Args:
        trunk: the size of the network.
        num_classes: output channels, at least 1.
        task: BatchNorm momentum and initialisation.
        options: the gates and the rest; see `Options`.

    Raises:
        TypeError: `num_classes` is not an integer.
        ValueError: `num_classes` is below 1.
    """

    def __init__(self, trunk: Trunk, num_classes: int, task: Task, options: Options) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int):
            raise TypeError(f"num_classes must be an integer, got {num_classes!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.options = options
        channels = [trunk.width * 2**k for k in range(4)]

        self.conv1, self.bn1 = conv_norm(3, 64, 3, stride=2)
        self.conv2, self.bn2 = conv_norm(64, 64, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        stage1_channels = 64 * Bottleneck.expansion
        self.layer1 = nn.Sequential(
            Bottleneck(64, 64), *(Bottleneck(stage1_channels, 64) for _ in range(trunk.stage1_blocks - 1))
        )

        self.transition1 = nn.ModuleList(
            [conv_norm_relu(stage1_channels, channels[0], 3), _new_branch(stage1_channels, channels[1])]
        )
        self.stage2 = _stage(trunk, 2, options)
        self.transition2 = nn.ModuleList([nn.Identity(), nn.Identity(), _new_branch(channels[1], channels[2])])
        self.stage3 = _stage(trunk, 3, options)
        self.transition3 = nn.ModuleList([*(nn.Identity() for _ in range(3)), _new_branch(channels[2], channels[3])])
        self.stage4 = _stage(trunk, 4, options)

        gated = options.gated_transition
        self.last_layer_stage2 = head(sum(channels[:2]), num_classes) if 2 in gated else None
        self.att2 = TransitionGate(num_classes, 2) if 2 in gated else None
        self.last_layer_stage3 = head(sum(channels[:3]), num_classes) if 3 in gated else None
        self.att3 = TransitionGate(num_classes, 3) if 3 in gated else None
        self.last_layer = head(sum(channels), num_classes)

        self._initialise(task, options)

    def forward(self, input: Tensor) -> Tensor | list[Tensor]:
        """Compute the logit maps of a batch of images.

        Args:
            input: images (N, 3, H, W), floating point, H and W at least 32 (they need not divide by 32).

        Returns:
            In eval mode the logits (N, num_classes, ceil(H / 4), ceil(W / 4)). In training mode the list of the logits
            and the class maps of the gated transitions that exist: [main, after stage 3, after stage 2], all that size.

        Raises:
            TypeError: `input` is not floating point.
            ValueError: `input` does not have four dimensions, three channels, and H, W >= 32.
        """
        _check_input(input)
        x = self.relu(self.bn1(self.conv1(input)))
        x = self.layer1(self.relu(self.bn2(self.conv2(x))))
        branches = self.stage2([layers(x) for layers in self.transition1])
        branches, after_stage2 = self._transition(branches, self.transition2, self.last_layer_stage2, self.att2)
        branches = self.stage3(branches)
        branches, after_stage3 = self._transition(branches, self.transition3, self.last_layer_stage3, self.att3)
        branches = self.stage4(branches)
        main = self.last_layer(concat_upsampled(branches, self.options.align_corners))
        if not self.training:
            return main
        return [logits for logits in (main, after_stage3, after_stage2) if logits is not None]

    def _transition(
        self, branches: list[Tensor], layers: nn.ModuleList, predictor: nn.Module | None, gate: nn.Module | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The branches with a new one behind them, and the class map if the transition is gated."""
        if predictor is None or gate is None:
            return [*branches, layers[-1](branches[-1])], None
        new, class_map = gated_transition(branches, predictor, gate, layers[-1], self.options.align_corners)
        return [*branches, new], class_map

    def _initialise(self, task: Task, options: Options) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=task.conv_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = task.bn_momentum if options.bn_momentum is None else options.bn_momentum
        for module in self.modules():
            if isinstance(module, GatedModule):
                module.start_gates(options.gate_bias_init)


def _stage(trunk: Trunk, stage: int, options: Options) -> nn.Sequential:
    """The multi-branch modules of stage 2, 3 or 4, which has as many branches as its number says."""
    return nn.Sequential(
        *(
            MultiBranchModule(
                [trunk.width * 2**k for k in range(stage)],
                trunk.blocks,
                gated=options.gated_fusion,
                gate_form=options.gate_form,
                gate_bias=options.gate_bias_init is not None,
                align_corners=options.align_corners,
            )
            for _ in range(trunk.modules[stage - 2])
        )
    )


def _new_branch(in_channels: int, out_channels: int) -> nn.Sequential:
    """The layers of a new branch; nested once more than the others, as in the published checkpoints."""
    return nn.Sequential(conv_norm_relu(in_channels, out_channels, 3, stride=2))


def _check_input(input: Tensor) -> None:
    if input.dim() != 4 or input.shape[1] != 3 or input.shape[2] < MIN_SIZE or input.shape[3] < MIN_SIZE:
        raise ValueError(f"input must be (N, 3, H, W) with H, W >= {MIN_SIZE}, got shape {tuple(input.shape)}")
    if not torch.is_floating_point(input):
        raise TypeError(f"input must be floating point, got {input.dtype}")
