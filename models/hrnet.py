"""HRNet, HRNetV2 and GSTO-HRNet (arXiv 2005.13363, Section 3.2 and Fig. 3): one trunk, with the gates as options."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import Bottleneck, LevelsHead, concat_upsampled, conv_norm, conv_norm_relu
from .checks import check_image, check_num_classes
from .config import TRANSITION_STAGES, Options, Task, Trunk
from .fused import FusedModule, convolve_norm_relu, set_fused
from .gated_fusion import MultiBranchModule
from .gated_transition import TransitionGate, TransitionTransfer
from .gates import GatedModule
from .rival_gates import gates_at


class HRNet(FusedModule):
    """HRNetV2; GSTO-HRNet if the options ask for gates; HRNet (for pose) if they ask for a single output.

    A stem of two stride-2 convolutions, stage 1 of bottlenecks, then stages 2, 3 and 4 with 2, 3 and 4 parallel
    branches at 1/4, 1/8, 1/16 and 1/32 of the image, and a head on all branches, upsampled to 1/4 and concatenated.
    State-dict keys are those of the published HRNet and GSTO checkpoints. Use `create_model` to build one by name.

    Args:
        trunk: the size of the network.
        num_classes: output channels, at least 1.
        task: BatchNorm momentum, initialisation and the key of the head.
        options: the gates and the rest; see `Options`.

    Raises:
        TypeError: `num_classes` is not an integer.
        ValueError: `num_classes` is below 1.
    """

    def __init__(self, trunk: Trunk, num_classes: int, task: Task, options: Options) -> None:
        super().__init__()
        check_num_classes(num_classes)
        self.options = options
        self.head_name = task.head_name
        self.upsampling: dict[str, Any] = {"mode": options.upsampling, "align_corners": options.align_corners}
        channels = [trunk.width * 2**k for k in range(4)]
        gate = gates_at("layer", options)

        self.conv1, self.bn1 = conv_norm(3, 64, 3, stride=2)
        self.conv2, self.bn2 = conv_norm(64, 64, 3, stride=2)
        self.gate1, self.gate2 = gate(64), gate(64)
        self.relu = nn.ReLU(inplace=True)
        stage1_channels = 64 * Bottleneck.expansion
        self.layer1 = nn.Sequential(
            Bottleneck(64, 64, gate=gate),
            *(Bottleneck(stage1_channels, 64, gate=gate) for _ in range(trunk.stage1_blocks - 1)),
        )

        for stage in TRANSITION_STAGES:
            levels = [stage1_channels] if stage == 1 else channels[:stage]
            self._add_transition(stage, levels, channels, num_classes)
            self.add_module(f"stage{stage + 1}", _stage(trunk, stage + 1, options))
        self.add_module(
            task.head_name,
            LevelsHead(channels, num_classes, self.upsampling, options.scale_equalizer)
            if options.multi_scale_output
            else nn.Conv2d(channels[0], num_classes, 1),
        )

        self._initialise(task, options)
        set_fused(self, options.fused)

    @property
    def head(self) -> nn.Module:
        """The layers that make the output: `last_layer` for segmentation, `final_layer` for pose."""
        return self.get_submodule(self.head_name)

    def forward(self, input: Tensor) -> Tensor | list[Tensor]:
        """Compute the logit maps, or heatmaps, of a batch of images.

        Args:
            input: images (N, 3, H, W), floating point, H and W at least 32 (they need not divide by 32).

        Returns:
            In eval mode the maps (N, num_classes, ceil(H / 4), ceil(W / 4)). In training mode the list of these and
            the class maps that exist (of supervised gated transitions and of `auxiliary_supervision`), last stage first:
            [main, after stage 3, after stage 2, after stage 1], all that size. The paper's loss weights of a network with
            GTMs after stages 2 and 3 are 1.0, 0.5 and 0.3 (and 0.2 for stage 1).

        Raises:
            TypeError: `input` is not floating point.
            ValueError: `input` does not have four dimensions, three channels, and H, W >= 32.
        """
        check_image(input)
        x = self.gate1(self._convolve(input, self.conv1, self.bn1))
        branches = [self.layer1(self.gate2(self._convolve(x, self.conv2, self.bn2)))]
        class_maps: list[Tensor] = []
        for stage in TRANSITION_STAGES:
            branches, class_map = self._transition(branches, stage)
            branches = self._run_stage(stage + 1, branches)
            if class_map is not None:
                class_maps.insert(0, class_map)
        main = self.head(branches if self.options.multi_scale_output else branches[0])
        return [main, *class_maps] if self.training else main

    def _add_transition(self, stage: int, levels: list[int], channels: list[int], num_classes: int) -> None:
        """Add what stands between stage `stage`, whose branches are as wide as `levels` says, and the next one."""
        options, total = self.options, sum(levels)
        gated = stage in options.gated_transition
        supervised = gated and options.transition_supervision
        predicted = supervised or stage in options.auxiliary_supervision
        new: nn.Module
        gate = None
        if gated and options.transition_form == "paper":
            classes = num_classes if supervised else None
            new = TransitionTransfer(total, channels[stage], classes, options.gate_bias_init)
            predicted = predicted and not supervised  # a supervised transfer has a predictor of its own
        else:
            # Nested once more than the layers of the other branches, as in the published checkpoints.
            new = nn.Sequential(conv_norm_relu(levels[-1], channels[stage], 3, stride=2))
            if gated:
                inputs, kernel_size = (num_classes, 3) if supervised else (total, 1)
                gate = TransitionGate(inputs, stage, kernel_size, self.upsampling)
        kept = [conv_norm_relu(total, channels[0], 3)] if stage == 1 else [nn.Identity() for _ in levels]
        self.add_module(f"transition{stage}", nn.ModuleList([*kept, new]))
        predictor = LevelsHead(levels, num_classes, self.upsampling, options.scale_equalizer) if predicted else None
        self.register_module(f"last_layer_stage{stage}", predictor)
        self.register_module(f"att{stage}", gate)

    def _run_stage(self, stage: int, branches: list[Tensor]) -> list[Tensor]:
        layers = self.get_submodule(f"stage{stage}")
        if stage not in self.options.checkpointing or not self.training or not torch.is_grad_enabled():
            return layers(branches)
        for module in layers.children():
            again = partial(_with_frozen_statistics, module)
            branches = checkpoint(module, branches, use_reentrant=False, context_fn=again)
        return branches

    def _convolve(self, x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
        return convolve_norm_relu(x, conv, norm) if self.fused else self.relu(norm(conv(x)))

    def _transition(self, branches: list[Tensor], stage: int) -> tuple[list[Tensor], Tensor | None]:
        """The branches with a new one behind them, and the class map if the gate or an auxiliary loss reads one."""
        layers = list(cast(nn.ModuleList, self.get_submodule(f"transition{stage}")))
        predictor, gate = getattr(self, f"last_layer_stage{stage}"), getattr(self, f"att{stage}")
        supervised_gate = gate is not None and self.options.transition_supervision
        kept = [layer(branch) for layer, branch in zip(layers[:-1], branches, strict=True)]
        lowest, class_map, new = branches[-1], None, layers[-1]
        if predictor is not None and (supervised_gate or self.training):
            class_map = predictor(branches)
        if isinstance(new, TransitionTransfer):
            size = ((lowest.shape[2] + 1) // 2, (lowest.shape[3] + 1) // 2)
            output, supervised_map = new(concat_upsampled(branches, **self.upsampling), size)
            return [*kept, output], class_map if supervised_map is None else supervised_map
        if gate is not None:
            lowest = gate([class_map] if supervised_gate else branches) * lowest
        return [*kept, new(lowest)], class_map

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


def _with_frozen_statistics(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first and of the second run of a checkpointed module: the second one leaves running statistics alone."""
    return nullcontext(), _frozen_statistics(module)


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    tracking = [
        m for m in module.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm) and m.track_running_stats
    ]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def _stage(trunk: Trunk, stage: int, options: Options) -> nn.Sequential:
    """The multi-branch modules of stage 2, 3 or 4, which has as many branches as its number says."""
    channels = [trunk.width * 2**k for k in range(stage)]
    count = trunk.modules[stage - 2]
    single = count - 1 if stage == 4 and not options.multi_scale_output else None
    return nn.Sequential(
        *(MultiBranchModule(channels, trunk.blocks, options, 1 if m == single else None) for m in range(count))
    )
