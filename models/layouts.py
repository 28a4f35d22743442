"""What published weight files look like: wrappers, prefixes, key layouts, in-place ABN; and how they are told apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import TRUNKS, Trunk

SOURCES = ("auto", "batch_norm", "inplace_abn")
LAYOUTS = ("native", "released")
ABN_EPS = 1e-5  # in-place ABN scales by |weight| + ABN_EPS

_ASSUMED = {
    "batch_norm": "ordinary BatchNorm",
    "inplace_abn": "in-place ABN (every BatchNorm weight becomes |weight| + 1e-5)",
}
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_ANCHOR = "layer1.0.conv1.weight"  # every HRNet and every ResNet has it
_CLASSIFIER = re.compile(r"(backbone\.)?(incre_modules|downsamp_modules|classifier)\.")
_OTHER_HEADS = re.compile(r"(decode_head|auxiliary_head|keypoint_head)\.")  # of the OpenMMLab projects
_GATE = re.compile(r"(.*\.)?(att_layers|att\d|\w*gates?\d?)\.")
_FUSION_GATE = re.compile(r"stage\d\.\d+\.att_layers\.\d\.\d\.([01])\.(weight|bias)")
_TRUNK = re.compile(r"(backbone\.)?(conv[12]|bn[12]|layer\d|transition\d|stage\d\.\d+\.(branches|fuse_layers))\.")
_RELEASED = re.compile(
    r"(last_layer(_stage\d)?|final_layer)\.(\d\.)?(weight|bias|running_mean|running_var|num_batches_tracked)$"
    r"|(stage\d\.\d+\.att_layers|att\d)\.|" + _TRUNK.pattern
)


@dataclass(frozen=True)
class Contents:
    """The tensors of a weight file under the names that this package gives them, and what the file was.

    Attributes:
        tensors: name -> tensor; BatchNorm's weights are the scales themselves, whatever the file's convention.
        family: "GSTO-HRNet", "HRNet", "ResNet" or "unknown".
        looks_like: the network in words, for messages.
        source: "batch_norm" or "inplace_abn", the convention of the file's normalisation weights.
        assumption: how that was decided, in words.
        gate_form: "paper" or "released" of the fusion gates; None without them.
        gate_bias: whether paper-form fusion gates have a bias.
        task: "segmentation" or "pose", by the head; None without one.
        num_classes: output channels of the head; None without one.
        ignored: reason -> names of the tensors that are left out by design.
        origin: the file, or "state_dict".
    """

    tensors: dict[str, Tensor]
    family: str
    looks_like: str
    source: str
    assumption: str
    gate_form: str | None
    gate_bias: bool
    task: str | None
    num_classes: int | None
    ignored: dict[str, list[str]]
    origin: str = "state_dict"


def understand(state_dict: Mapping[str, Any], source: str = "auto") -> Contents:
    """Unwrap a loaded file, bring its names and its normalisation to this package's, and say what it is.

    Args:
        state_dict: the loaded object; tensors may lie under a wrapping key such as "state_dict", and their names may have
            any prefix ("model.", "module.", "network.", ...).
        source: "batch_norm", "inplace_abn", or "auto": in-place ABN is assumed for an HRNet segmentation file without any
            `num_batches_tracked`, which ordinary BatchNorm saves. Pose, ImageNet and ResNet files are ordinary.

    Raises:
        ValueError: no tensors in it, or an unknown `source`.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {SOURCES}, got {source!r}")
    tensors, ignored = _strip_prefix(_unwrap(state_dict))
    for reason, names in _ignored_by_design(tensors).items():
        ignored[reason] = names
        tensors = {name: tensor for name, tensor in tensors.items() if name not in set(names)}
    imagenet = any("ImageNet" in reason for reason in ignored)
    family = family_of(tensors)
    pose = _has(tensors, "final_layer.")
    why = f"source={source!r}"
    if source == "auto":
        tracked = any(name.endswith("num_batches_tracked") for name in tensors)
        segmentation = "HRNet" in family and not imagenet and not pose
        source = "inplace_abn" if segmentation and not tracked else "batch_norm"
        why = "an HRNet segmentation file without num_batches_tracked" if source == "inplace_abn" else "by its names"
    if source == "inplace_abn":
        tensors = {
            name: tensor.abs() + ABN_EPS if _is_norm_weight(name, tensors) else tensor
            for name, tensor in tensors.items()
        }
    heads = [f"{head}.weight" for head in ("last_layer.3", "final_layer.3", "final_layer", "head.classifier")]
    classes = next((len(tensors[head]) for head in heads if head in tensors), None)
    return Contents(
        tensors=tensors,
        family=family,
        looks_like=describe(tensors) + (", an ImageNet classifier" if imagenet else ""),
        source=source,
        assumption=f"taken for {_ASSUMED[source]}, {why}",
        gate_form=gate_form_of(tensors),
        gate_bias=has_gate_bias(tensors),
        task=None if classes is None else "pose" if pose else "segmentation",
        num_classes=classes,
        ignored=ignored,
    )


def to_layout(state_dict: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The tensors of a network of this package in another layout.

    Args:
        state_dict: of the network.
        layout: "native", names as they are; or "released", as the authors' files: prefix "model.", and for segmentation
            in-place ABN instead of BatchNorm, whose scale is |weight| + 1e-5. That scale is positive, so where ours is
            negative the sign moves into the convolution before it and into the running mean, which changes no output.

    Raises:
        ValueError: an unknown layout; for "released", a network that has no such form, or a scale below 1e-5.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    tensors = dict(state_dict)
    if layout == "native":
        return tensors
    if "HRNet" not in family_of(tensors):
        raise ValueError(f"layout='released' is for HRNet and GSTO-HRNet, this is {describe(tensors)}")
    if gate_form_of(tensors) == "paper":
        raise ValueError("layout='released' is for gate_form='released': released files have no paper-form gates")
    others = [name for name in tensors if not _RELEASED.match(name) or ".transfer." in name or "gate" in name]
    if others:
        raise ValueError(
            f"layout='released' has no place for {others[0]}, which belongs to an option of this package alone"
        )
    if not _has(tensors, "final_layer."):  # pose files have ordinary BatchNorm
        tensors = _to_inplace_abn(tensors)
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def family_of(names: Iterable[str]) -> str:
    """ "GSTO-HRNet", "HRNet", "ResNet" or "unknown" by a network's tensor names."""
    names = {name.removeprefix("backbone.") for name in names}
    if "stage2.0.branches.0.0.conv1.weight" in names:
        return "GSTO-HRNet" if gate_names(names) else "HRNet"
    return "ResNet" if {_ANCHOR, "layer4.0.conv1.weight"} <= names else "unknown"


def gate_names(names: Iterable[str]) -> set[str]:
    """The names of gates' tensors, without the counters of BatchNorm."""
    return {name for name in names if _GATE.match(name) and not name.endswith("num_batches_tracked")}


def gate_form_of(names: Iterable[str]) -> str | None:
    """The form of spatial fusion gates: "released" ones have a BatchNorm (index 1) behind their convolution (index 0)."""
    fusion = [match for name in names if (match := _FUSION_GATE.fullmatch(name))]
    return None if not fusion else "released" if any(match[1] == "1" for match in fusion) else "paper"


def has_gate_bias(names: Iterable[str]) -> bool:
    """Whether the convolutions of spatial fusion gates have a bias."""
    return any((match := _FUSION_GATE.fullmatch(name)) and match.groups() == ("0", "bias") for name in names)


def backbone_names(names: Iterable[str]) -> list[str]:
    """The names that belong to the backbone: trunk tensors without heads and gates; all names of an unknown network."""
    names = list(names)
    apart = ("num_batches_tracked", ".transfer.")  # counters, and gated transitions of the paper form
    trunk = [name for name in names if _TRUNK.match(name) and not _GATE.match(name)]
    return [name for name in trunk if not any(part in name for part in apart)] or names


def describe(tensors: Mapping[str, Tensor]) -> str:
    """A network in words, by the names and shapes of its tensors."""
    inner = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    family = family_of(tensors)
    if family == "unknown":
        first = ", ".join(list(tensors)[:3])
        return f"an unknown network (tensors {first}, ...)"
    if family == "ResNet":
        blocks = tuple(_count(inner, rf"layer{stage}\.(\d+)\.conv1\.weight") for stage in range(1, 5))
        text = "/".join(map(str, blocks))
        names = {"3/4/6/3": "ResNet-50", "3/4/23/3": "ResNet-101", "3/8/36/3": "ResNet-152"}
        known = names.get(text) if "layer1.0.conv3.weight" in inner else None
        return known or f"a ResNet with {text} blocks"
    trunk = Trunk(
        width=len(inner["stage2.0.branches.0.0.conv1.weight"]),
        stage1_blocks=_count(inner, r"layer1\.(\d+)\.conv1\.weight"),
        modules=tuple(_count(inner, rf"stage{s}\.(\d+)\.branches\.0\.0\.conv1\.weight") for s in (2, 3, 4)),  # type: ignore[arg-type]
        blocks=_count(inner, r"stage2\.0\.branches\.0\.(\d+)\.conv1\.weight"),
    )
    sizes = [size for size, known in TRUNKS.items() if known == trunk]
    size = sizes[0] if sizes else f"of width {trunk.width} in {trunk.modules} modules"
    form = gate_form_of(tensors)
    details = [f"gate_form={form!r}"] if form else []
    details += ["pose"] if _has(tensors, "final_layer.") else []
    name = "gsto_hrnet" if family == "GSTO-HRNet" else "hrnet" if "final_layer.weight" in inner else "hrnetv2"
    return " ".join([f"{name}_{size}", *details])


def _unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    while isinstance(state_dict, Mapping):
        inner = [state_dict[key] for key in _WRAPPERS if isinstance(state_dict.get(key), Mapping)]
        if not inner:
            break
        state_dict = inner[0]
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"the checkpoint must be a dictionary of tensors, got {type(state_dict).__name__}")
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"the checkpoint holds no tensors; its keys are {', '.join(map(str, list(state_dict)[:8]))}")
    return tensors


def _strip_prefix(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The network's tensors without what stands before all of their names; and the others, by reason."""
    prefixes = [name.removesuffix(_ANCHOR) for name in tensors if name.endswith(_ANCHOR)]
    if not prefixes:
        return tensors, {}
    prefix = prefixes[0]
    outer = prefix.removesuffix("backbone.")
    others = [name for name in tensors if not name.startswith(prefix)]
    if not any(_OTHER_HEADS.match(name.removeprefix(outer)) for name in others):
        prefix = outer  # a network with a part called "backbone", not a file of another project
        others = [name for name in tensors if not name.startswith(prefix)]
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return inner, {f"outside of {prefix}*, the network": others} if others else {}


def _ignored_by_design(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    ignored: dict[str, list[str]] = {}
    if any(_CLASSIFIER.match(name) for name in tensors) and "HRNet" in family_of(tensors):
        heads = ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier.")
        names = [name for name in tensors if name.removeprefix("backbone.").startswith(heads)]
        ignored["the head of an ImageNet classifier"] = names
    if family_of(tensors) == "ResNet":
        names = [name for name in tensors if re.match(r"(backbone\.)?fc\.(weight|bias)$", name)]
        if names:
            ignored["the head of an ImageNet classifier"] = names
    unused = [name for name in tensors if name.startswith("att1.")]
    if unused and _has(tensors, "last_layer_stage2.") and not _has(tensors, "last_layer_stage1."):
        ignored["att1: the released network never uses it"] = unused
    return ignored


def _to_inplace_abn(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    conv = ""  # in every network of this package a BatchNorm stands right behind its convolution
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dim() == 4:
            conv = name.removesuffix(".weight")
        elif _is_norm_weight(name, tensors):
            if tensor.abs().min() < ABN_EPS:
                raise ValueError(
                    f"layout='released' cannot hold {name}: in-place ABN's scales are at least {ABN_EPS}, this one has "
                    f"{tensor.abs().min():.3g}; layout='native' has the same names with ordinary BatchNorm"
                )
            sign = tensor.sign()
            result[name] = _before_abn(tensor.abs())
            result[f"{conv}.weight"] = result[f"{conv}.weight"] * sign[:, None, None, None]
            mean = name.removesuffix("weight") + "running_mean"
            result[mean] = result[mean] * sign
            if f"{conv}.bias" in result:
                result[f"{conv}.bias"] = result[f"{conv}.bias"] * sign
    return result


def _before_abn(scale: Tensor) -> Tensor:
    """The weight w >= 0 with w + ABN_EPS == scale after rounding.

    In float32 half of the scales from 7.1e-5 to 1.2e-4 have none (ABN_EPS is an odd number of half steps of the grid there);
    they come out one step away.
    """
    weight = scale - ABN_EPS
    for _ in range(2):  # the difference, rounded, may be a step of its grid away
        error = scale - (weight + ABN_EPS)
        weight = torch.where(error == 0, weight, torch.nextafter(weight, error.sign() * torch.inf)).clamp(min=0)
    return weight


def _is_norm_weight(name: str, names: Mapping[str, Any]) -> bool:
    return name.endswith(".weight") and name.removesuffix("weight") + "running_mean" in names


def _has(names: Iterable[str], prefix: str) -> bool:
    return any(name.removeprefix("backbone.").startswith(prefix) for name in names)


def _count(names: Iterable[str], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)
