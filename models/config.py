"""The frozen descriptions that one builder turns into networks: the trunk's size, the task, and the options."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from .gates import GATE_FORMS

TRANSITION_STAGES = (2, 3)


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
        bn_momentum: the default momentum of every BatchNorm.
        conv_std: standard deviation of the normal distribution that convolution weights start from.
    """

    bn_momentum: float
    conv_std: float


TRUNKS = {
    "w18_small_v2": Trunk(width=18, stage1_blocks=2, modules=(1, 3, 2), blocks=2),
    "w18": Trunk(width=18, stage1_blocks=4, modules=(1, 4, 3), blocks=4),
    "w32": Trunk(width=32, stage1_blocks=4, modules=(1, 4, 3), blocks=4),
    "w48": Trunk(width=48, stage1_blocks=4, modules=(1, 4, 3), blocks=4),
}

TASKS = {"segmentation": Task(bn_momentum=0.01, conv_std=0.001)}


@dataclass(frozen=True)
class Options:
    """The options of a network; a value that is not allowed is a TypeError or ValueError that names the option.

    Attributes:
        gated_fusion: gates in every fusion (GFM).
        gated_transition: the stages, among 2 and 3, after which a new branch starts through a gated transition (GTM).
        gate_form: of the fusion gates: "paper" = sigmoid(conv1x1), "released" = sigmoid(ReLU(BatchNorm(conv1x1))).
            GTM's gates have one form.
        gate_bias_init: None, or the number that the logit of every gate starts from; 4 starts the gates open at 0.98.
            See `absorb_initial_gates` for gates in a network that is already trained.
            Paper-form fusion gates get a learnable bias for it; the others, which end in BatchNorm and ReLU, start
            BatchNorm's own bias there, so for them it must not be negative: behind their ReLU nothing would be left.
        bn_momentum: of every BatchNorm; None is the task's default (0.01 for segmentation).
        align_corners: of every bilinear upsampling.
    """

    gated_fusion: bool = False
    gated_transition: Collection[int] = ()
    gate_form: str = "paper"
    gate_bias_init: float | None = None
    bn_momentum: float | None = None
    align_corners: bool = False

    def __post_init__(self) -> None:
        for name in ("gated_fusion", "align_corners"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if self.gate_form not in GATE_FORMS:
            raise ValueError(f"gate_form must be one of {GATE_FORMS}, got {self.gate_form!r}")
        if isinstance(self.gated_transition, str) or not isinstance(self.gated_transition, Collection):
            raise TypeError(f"gated_transition must be a tuple of stages, got {self.gated_transition!r}")
        given = list(self.gated_transition)
        stages = tuple(stage for stage in TRANSITION_STAGES if stage in given)
        if len(given) != len(stages):
            raise ValueError(
                f"gated_transition must be stages out of {TRANSITION_STAGES}, each once, got {self.gated_transition!r}"
            )
        object.__setattr__(self, "gated_transition", stages)
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("gate_bias_init", "bn_momentum"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"{name} must be None or a number, got {value!r}")
        if self.bn_momentum is not None and not 0 < self.bn_momentum <= 1:
            raise ValueError(f"bn_momentum must be in (0, 1], got {self.bn_momentum!r}")
        if self.gate_bias_init is None:
            return
        if not math.isfinite(self.gate_bias_init):
            raise ValueError(f"gate_bias_init must be finite, got {self.gate_bias_init!r}")
        clipped = bool(self.gated_transition) or (self.gated_fusion and self.gate_form == "released")
        if clipped and self.gate_bias_init < 0:
            raise ValueError(
                f"gate_bias_init must be at least 0, got {self.gate_bias_init!r}: the released form's gates and those "
                f"of gated transitions end in ReLU, which would clip a negative logit and stop their gradients"
            )
