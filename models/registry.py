"""Networks by name."""

import difflib
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from torch import nn

from .checkpoints import Checkpoint, gate_options, load_checkpoint, read_checkpoint
from .config import TASKS, TRUNKS, Options, Task
from .hrnet import HRNet
from .layouts import Contents
from .resnet_networks import PyramidOptions, ResNetSegmenter, RSPOptions

_logger = logging.getLogger("gsto_models")


@dataclass(frozen=True)
class Model:
    """A row of the registry.

    Attributes:
        build: makes the network of (num_classes, task, options).
        defaults: the frozen dataclass of the network's options, with the values that the name stands for.
        tasks: the names of the tasks that the network is for.
    """

    build: Callable[[int, Task, Any], nn.Module]
    defaults: Any
    tasks: tuple[str, ...] = tuple(TASKS)


def _hrnet(size: str, num_classes: int, task: Task, options: Options) -> HRNet:
    return HRNet(TRUNKS[size], num_classes, task, options)


def _resnet(head: str, num_classes: int, task: Task, options: PyramidOptions | RSPOptions) -> ResNetSegmenter:
    return ResNetSegmenter(head, num_classes, task, options)


_POSE_HRNET = Options(multi_scale_output=False, upsampling="nearest")
_GSTO_HRNET = Options(gated_fusion=True, gated_transition=(2, 3))

_MODELS = {
    **{f"hrnetv2_{size}": Model(partial(_hrnet, size), Options()) for size in TRUNKS},
    **{f"gsto_hrnet_{size}": Model(partial(_hrnet, size), _GSTO_HRNET) for size in TRUNKS},
    **{f"hrnet_{size}": Model(partial(_hrnet, size), _POSE_HRNET, tasks=("pose",)) for size in ("w32", "w48")},
    "pspnet_r50": Model(partial(_resnet, "ppm"), PyramidOptions(), tasks=("segmentation",)),
    "deeplabv3_r50": Model(partial(_resnet, "aspp"), PyramidOptions(), tasks=("segmentation",)),
    "rsp_r50": Model(partial(_resnet, "rsp"), RSPOptions(), tasks=("segmentation",)),
}


def list_models(task: str | None = None) -> list[str]:
    """The names that `create_model` takes, of all tasks or of one ("segmentation" or "pose").

    Raises:
        ValueError: unknown task.
    """
    if task is not None:
        _check_task(task)
    return [name for name, model in _MODELS.items() if task is None or task in model.tasks]


def create_model(
    name: str,
    num_classes: int | None = None,
    task: str | None = None,
    *,
    pretrained: Checkpoint | None = None,
    **options: Any,
) -> nn.Module:
    """Build a network, with fresh weights or with those of a file.

    Args:
        name: one of `list_models()`. `hrnetv2_*` has no gates; `gsto_hrnet_*` has gated fusion, and gated transitions
            after stages 2 and 3, in the form of the paper; `hrnet_*` is the plain HRNet of pose estimation, with one
            output branch and nearest upsampling. `pspnet_r50` (PPM), `deeplabv3_r50` (ASPP) and `rsp_r50` (RSP head)
            are segmentation networks on ResNet-50.
        num_classes: output channels: classes, or the heatmaps of a pose network; None is the task's default (19 for
            segmentation, Cityscapes; 17 for pose, COCO's keypoints).
        task: "segmentation" or "pose": the default BatchNorm momentum, and the key of the head in the state dict. None is
            segmentation, and pose for the networks that are for pose only.
        pretrained: a weight file, or another checkpoint that `load_checkpoint` takes. The task, `num_classes` and the form
            of the fusion gates are the file's where they are not given; what was taken is logged as a warning, the
            report of the load as info, by the logger "gsto_models".
        **options: replace the name's defaults; see `gsto_models.Options` for HRNets, `PyramidOptions` for
            `pspnet_r50` and `deeplabv3_r50`, `RSPOptions` for `rsp_r50`.

    Returns:
        The network, an `nn.Module` in training mode, float32, fresh weights (HRNet's convolutions are drawn from
        N(0, 0.001)) and gates as `gate_bias_init` says. HRNets map (N, 3, H, W) to maps at a quarter of the size; see
        `HRNet.forward`, and `ResNetSegmenter.forward` for the networks on ResNet-50.

    Raises:
        ValueError: unknown name or task, a task that the network is not for, or a value that an option does not allow;
            and what `load_checkpoint` raises.
        TypeError: an unknown option, or a value of the wrong type.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(str(name), _MODELS, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown model name {name!r}; {hint}the models are: {', '.join(_MODELS)}")
    model = _MODELS[name]
    contents = None if pretrained is None else read_checkpoint(pretrained)
    if task is None:
        task = contents.task if contents is not None and contents.task in model.tasks else model.tasks[0]
    _check_task(task)
    if task not in model.tasks:
        raise ValueError(f"{name} is for task {' or '.join(map(repr, model.tasks))} only, got task={task!r}")
    allowed = [field.name for field in fields(model.defaults)]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise TypeError(f"unknown option {', '.join(unknown)} for {name}; the options are: {', '.join(allowed)}")
    if contents is not None:
        num_classes, options = _from_file(contents, task, num_classes, options, model.defaults)
    num_classes = TASKS[task].num_classes if num_classes is None else num_classes
    network = model.build(num_classes, TASKS[task], type(model.defaults)(**{**asdict(model.defaults), **options}))
    if contents is not None:
        _logger.info("%s", load_checkpoint(network, contents))
    return network


def _from_file(
    contents: Contents, task: str, num_classes: int | None, options: dict[str, Any], defaults: Any
) -> tuple[int | None, dict[str, Any]]:
    """`num_classes` and the options, with what the caller left open taken from a file's tensors."""
    taken = {
        key: value for key, value in gate_options(contents).items() if hasattr(defaults, key) and key not in options
    }
    said = {key: value for key, value in taken.items() if value != getattr(defaults, key)}
    if num_classes is None and contents.task == task:
        num_classes = said["num_classes"] = contents.num_classes
    if said:
        text = ", ".join(f"{key}={value!r}" for key, value in said.items())
        _logger.warning("%s looks like %s, so taken from it: %s", contents.origin, contents.looks_like, text)
    return num_classes, {**taken, **options}


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task must be one of {tuple(TASKS)}, got {task!r}")
