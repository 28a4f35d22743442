"""Networks by name."""

import difflib
from dataclasses import asdict, fields
from typing import Any

from .config import TASKS, TRUNKS, Options
from .hrnet import HRNet

_DEFAULTS = {
    **{f"hrnetv2_{size}": (size, Options()) for size in TRUNKS},
    **{f"gsto_hrnet_{size}": (size, Options(gated_fusion=True, gated_transition=(2, 3))) for size in TRUNKS},
}


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    return list(_DEFAULTS)


def create_model(name: str, num_classes: int = 19, task: str = "segmentation", **options: Any) -> HRNet:
    """Build a network with fresh weights.

    Args:
        name: one of `list_models()`. `hrnetv2_*` has no gates; `gsto_hrnet_*` has gated fusion, and gated transitions
            after stages 2 and 3, in the form of the paper.
        num_classes: output channels.
        task: "segmentation".
        **options: replace the name's defaults; see `gsto_models.Options` for what they mean: gated_fusion,
            gated_transition, gate_form, gate_bias_init, bn_momentum, align_corners.

    Returns:
        The network in training mode, float32, convolution weights drawn from N(0, 0.001) and gates as `gate_bias_init`
        says. It maps (N, 3, H, W) to logits at a quarter of the size; see `HRNet.forward`.

    Raises:
        ValueError: unknown name or task, or a value that an option does not allow.
        TypeError: an unknown option, or a value of the wrong type.
    """
    if name not in _DEFAULTS:
        near = difflib.get_close_matches(str(name), _DEFAULTS, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown model name {name!r}; {hint}the models are: {', '.join(_DEFAULTS)}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {tuple(TASKS)}, got {task!r}")
    allowed = [field.name for field in fields(Options)]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise TypeError(f"unknown option {', '.join(unknown)} for {name}; the options are: {', '.join(allowed)}")
    size, defaults = _DEFAULTS[name]
    return HRNet(TRUNKS[size], num_classes, TASKS[task], Options(**{**asdict(defaults), **options}))
