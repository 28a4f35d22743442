"""The frozen descriptions that one builder turns into networks: the trunk's size, the task, and the options."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from .checks import check_bn_momentum, check_flags, check_optional_number
from .gates import GATE_FORMS

TRANSITION_STAGES = (1, 2, 3)
STAGES = {
    "gated_transition": TRANSITION_STAGES,
    "auxiliary_supervision": TRANSITION_STAGES,
    "checkpointing": (2, 3, 4),
}
CHOICES = {
    "gate_form": GATE_FORMS,
    "gate_kind": ("spatial", "channel"),
    "gate_position": ("transfer", "block", "layer"),
    "transition_form": ("released", "paper"),
    "upsampling": ("bilinear", "nearest"),
}


@dataclass(frozen=True)
class Trunk:
    """The size of an HRNet trunk.

    Attributes:
        width: channels of the highest-resolution branch; branch k has 2**k times as many.
        stage1_blocks: bottlenecks in stage 1.
        modules: multi-branch modules in stages 2, 3 and 4.
        blocks: residual blocks per branch and module.
    """

    width: int
    stage1_blocks: int
    modules: tuple[int, int, int]
    blocks: int


@dataclass(frozen=True)
class Task:
    """What a task decides about the network.

    Attributes:
        num_classes: the default number of output channels.
        bn_momentum: the default momentum of every BatchNorm.
        conv_std: standard deviation of the normal distribution that convolution weights start from.
        head_name: the state-dict key of the head, as in the published checkpoints of the task.
    """

    num_classes: int
    bn_momentum: float
    conv_std: float
    head_name: str


TRUNKS = {
    "w18_small_v2": Trunk(width=18, stage1_blocks=2, modules=(1, 3, 2), blocks=2),
    "w18": Trunk(width=18, stage1_blocks=4, modules=(1, 4, 3), blocks=4),
    "w32": Trunk(width=32, stage1_blocks=4, modules=(1, 4, 3), blocks=4),
    "w48": Trunk(width=48, stage1_blocks=4, modules=(1, 4, 3), blocks=4),
}

TASKS = {
    "segmentation": Task(num_classes=19, bn_momentum=0.01, conv_std=0.001, head_name="last_layer"),
    "pose": Task(num_classes=17, bn_momentum=0.1, conv_std=0.001, head_name="final_layer"),
}


@dataclass(frozen=True)
class Options:
    """The options of an HRNet; a value that is not allowed is a TypeError or ValueError that names the option.

    Attributes:
        gated_fusion: gates in every multi-branch module (GFM).
        gate_form: of the fusion gates: "paper" = sigmoid(conv1x1), "released" = sigmoid(ReLU(BatchNorm(conv1x1))).
        gate_kind, gate_position: what the gates of `gated_fusion` select and where they stand. "spatial" gates at every
            "transfer" are the paper's; the rest, "channel" gates and those after every "block" or "layer", are the
            rivals that its Table 3 compares with; see `gsto_models.rival_gates`. Rivals have no `gate_form`.
        gated_transition: the stages, among 1, 2 and 3, after which a new branch starts through a gated transition (GTM).
        transition_form: of the gated transitions: "released", the gate shrinks the lowest branch's map, or "paper", the
            gated, projected and pooled concatenation of all branches is the new branch; see `gsto_models.gated_transition`.
        transition_supervision: whether the gates of transitions read a class map that an auxiliary loss supervises.
        auxiliary_supervision: stages with a class map for an auxiliary loss, whether their transition is gated or not
            (a supervised transition has one anyway). Where no gate reads it, it is computed in training only.
        gate_bias_init: None, or the number that the logit of every gate starts from; 4 starts the gates open at 0.98.
            See `absorb_initial_gates` for gates in a network that is already trained.
            Gates whose logit is a plain convolution get a learnable bias for it; released-form gates (of fusion and of
            transitions), which end in BatchNorm and ReLU, start BatchNorm's own bias there, so for them it must not be
            negative: behind their ReLU nothing would be left.
        bn_momentum: of every BatchNorm; None is the task's default (0.01 for segmentation, 0.1 for pose).
        upsampling: "bilinear", or "nearest" as in HRNet's pose networks.
        align_corners: of every bilinear upsampling.
        multi_scale_output: True, the head reads all branches (HRNetV2); False, the last module has the highest
            resolution as its only output, and the head is one 1x1 convolution on it (HRNet for pose).
        scale_equalizer: a scale equalizer in front of the head and of every class map's predictor, where all branches are
            upsampled and concatenated; see `measure_scales`. (The class map of a paper-form transition has none.)
        checkpointing: stages, among 2, 3 and 4, whose multi-branch modules keep only their inputs in training and run a second
            time in the backward pass: less memory, about a third more time in those stages; the numbers are the same.
        fused: batch norm, ReLU, sums, upsampling and gates in as few passes over memory as there can be
            (`gsto_ops.norm_sum`, `gsto_ops.gated_fusion`); False, one PyTorch operator after the other. The numbers and the
            state dict are the same; hooks on the modules inside do not run where they are fused.
    """

    gated_fusion: bool = False
    gate_form: str = "paper"
    gate_kind: str = "spatial"
    gate_position: str = "transfer"
    gated_transition: Collection[int] = ()
    transition_form: str = "released"
    transition_supervision: bool = True
    auxiliary_supervision: Collection[int] = ()
    gate_bias_init: float | None = None
    bn_momentum: float | None = None
    upsampling: Literal["bilinear", "nearest"] = "bilinear"
    align_corners: bool = False
    multi_scale_output: bool = True
    scale_equalizer: bool = False
    checkpointing: Collection[int] = ()
    fused: bool = True

    def __post_init__(self) -> None:
        flags = (
            "gated_fusion",
            "transition_supervision",
            "align_corners",
            "multi_scale_output",
            "scale_equalizer",
            "fused",
        )
        check_flags(**{name: getattr(self, name) for name in flags})
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, allowed in STAGES.items():
            object.__setattr__(self, name, self._stages(name, allowed))
        if self.align_corners and self.upsampling != "bilinear":
            raise ValueError(f"align_corners=True is for bilinear upsampling only, got upsampling={self.upsampling!r}")
        if self.scale_equalizer and not self.multi_scale_output:
            raise ValueError("scale_equalizer=True needs multi_scale_output=True: a head on one branch fuses no levels")
        if self.rival_gates and not self.gated_fusion:
            raise ValueError(
                f"gate_kind={self.gate_kind!r} with gate_position={self.gate_position!r} needs gated_fusion=True, "
                f"which is what puts gates into the multi-branch modules"
            )
        if self.rival_gates and self.gate_form != "paper":
            raise ValueError(
                f"gate_form={self.gate_form!r} is a form of spatial gates at the transfers, it does not go with "
                f"gate_kind={self.gate_kind!r} and gate_position={self.gate_position!r}"
            )
        self._check_numbers()

    @property
    def rival_gates(self) -> bool:
        """Whether the gates of `gated_fusion` are not those of the paper's operator but one of Table 3's others."""
        return (self.gate_kind, self.gate_position) != ("spatial", "transfer")

    def _stages(self, name: str, allowed: tuple[int, ...]) -> tuple[int, ...]:
        given = getattr(self, name)
        if isinstance(given, str) or not isinstance(given, Collection):
            raise TypeError(f"{name} must be a tuple of stages, got {given!r}")
        stages = tuple(stage for stage in allowed if stage in list(given))
        if len(given) != len(stages):
            raise ValueError(f"{name} must be stages out of {allowed}, each once, got {given!r}")
        return stages

    def _check_numbers(self) -> None:
        check_optional_number("gate_bias_init", self.gate_bias_init)
        check_bn_momentum(self.bn_momentum)
        released_transition = bool(self.gated_transition) and self.transition_form == "released"
        clipped = released_transition or (self.gated_fusion and self.gate_form == "released")
        if clipped and self.gate_bias_init is not None and self.gate_bias_init < 0:
            raise ValueError(
                f"gate_bias_init must be at least 0, got {self.gate_bias_init!r}: the released form's gates, of fusion "
                f"and of transitions, end in ReLU, which would clip a negative logit and stop their gradients"
            )
