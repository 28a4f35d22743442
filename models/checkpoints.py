"""Weights from files and into files: the published HRNet, GSTO-HRNet and ResNet layouts, and this package's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .hrnet import HRNet
from .layouts import (
    Contents,
    backbone_names,
    describe,
    gate_form_of,
    gate_names,
    has_gate_bias,
    to_layout,
    understand,
)
from .opening import absorb_initial_gates

StateDict = Mapping[str, Any]
Checkpoint = str | os.PathLike[str] | StateDict | Contents


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's tensors; `print(report)` shows it.

    Attributes:
        origin: the file, or "state_dict".
        looks_like: the network that the file's names and shapes belong to.
        matched: names that were loaded.
        missing: names of the model that the file lacks; they keep their values. Counters of BatchNorm are left out.
        unexpected: names of the file that the model has no place for.
        mismatched: name -> (shape in the file, shape in the model); not loaded.
        ignored: reason -> names of the file that are left out by design.
        backbone: how many tensors of the model's backbone were loaded, and how many it has.
        notes: what was assumed, and what was done besides copying.
    """

    origin: str
    looks_like: str
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    ignored: dict[str, list[str]]
    backbone: tuple[int, int]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        found, total = self.backbone
        lines = [
            f"{self.origin}: looks like {self.looks_like}; {len(self.matched)} tensors matched, "
            f"{found} of the backbone's {total}"
        ]
        lines += [f"  {title}: {_some(names)}" for title, names in self._lists() if names]
        lines += [f"  ignored ({reason}): {_some(names)}" for reason, names in self.ignored.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _lists(self) -> list[tuple[str, list[str]]]:
        shapes = [f"{name} {given} instead of {wanted}" for name, (given, wanted) in self.mismatched.items()]
        return [("missing", self.missing), ("unexpected", self.unexpected), ("mismatched", shapes)]


def load_checkpoint(
    model: nn.Module,
    checkpoint: Checkpoint,
    source: str = "auto",
    *,
    min_matched: float = 0.95,
    absorb_gates: bool = True,
) -> LoadReport:
    """Load weights of any published layout, or of this package, into a network of this package.

    Wrapping keys and prefixes are removed, heads of ImageNet classifiers and the released `att1` are left out, and scales of
    in-place ABN become BatchNorm's. Files of timm, torchvision (ResNet) and OpenMMLab load too, without their heads.
    On any error the model is as it was.

    Args:
        model: a network from `create_model`, changed in place.
        checkpoint: a file (.safetensors, or anything that `torch.load` reads with `weights_only=True`), a state dict, or what
            `read_checkpoint` made of either.
        source: how the file's normalisation layers scale: "batch_norm" by weight, "inplace_abn" by |weight| + 1e-5, "auto"
            guesses by the names (HRNet segmentation files without `num_batches_tracked` are in-place ABN).
        min_matched: the share of the backbone's tensors that must match; 0 takes whatever fits.
        absorb_gates: when weights without gates go into an HRNet whose gates start open (`gate_bias_init`), rescale them so
            that the output stays that of the network they came from (`absorb_initial_gates`).

    Returns:
        What was loaded and what was not.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: a .safetensors file without the package safetensors.
        ValueError: not a weight file; fewer matches than `min_matched`, naming the network that the file looks like; gates of
            another form than the model's, naming the option; a file with gates for a model without.
    """
    if not 0 <= min_matched <= 1:
        raise ValueError(f"min_matched must be from 0 to 1, got {min_matched!r}")
    contents = read_checkpoint(checkpoint, source)
    own = model.state_dict()
    tensors = _like_model(contents.tensors, own)
    same = {name for name in own if name in tensors and own[name].shape == tensors[name].shape}
    trunk = backbone_names(own)
    found = sum(name in same for name in trunk)
    report = LoadReport(
        origin=contents.origin,
        looks_like=contents.looks_like,
        matched=[name for name in own if name in same],
        missing=[name for name in own if name not in tensors and not name.endswith("num_batches_tracked")],
        unexpected=[name for name in tensors if name not in own],
        mismatched={
            name: (tuple(tensors[name].shape), tuple(own[name].shape))
            for name in own
            if name in tensors and name not in same
        },
        ignored=contents.ignored,
        backbone=(found, len(trunk)),
    )
    if found < min_matched * len(trunk):
        raise ValueError(
            f"{report.origin} looks like {contents.looks_like}, but the model is {describe(own)}: {found} of its backbone's "
            f"{len(trunk)} tensors match, at least {min_matched:.0%} must (min_matched)"
        )
    _check_gates(tensors, own, contents, min_matched)
    model.load_state_dict({name: tensors[name] for name in same}, strict=False)
    report.notes.append(contents.assumption)
    if not gate_names(tensors) and gate_names(own):
        report.notes.append(_start_gates(model, contents, absorb_gates))
    return report


def read_checkpoint(checkpoint: Checkpoint, source: str = "auto") -> Contents:
    """The tensors of a file under this package's names, and what the file is; arguments and errors of `load_checkpoint`."""
    if isinstance(checkpoint, Contents):
        return checkpoint
    if isinstance(checkpoint, Mapping):
        return understand(checkpoint, source)
    try:
        return replace(understand(_read(Path(checkpoint)), source), origin=str(checkpoint))
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def gate_options(contents: Contents) -> dict[str, Any]:
    """The options of `create_model` that decide which gate tensors a network has, as the fusion gates of a file want them."""
    if contents.gate_form is None:
        return {}
    if contents.gate_form == "released":
        return {"gate_form": "released"}
    return {"gate_form": "paper", "gate_bias_init": 0.0 if contents.gate_bias else None}


def save_checkpoint(
    model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], layout: str = "native"
) -> Path:
    """Write a network's weights: a .safetensors file by that suffix, otherwise what `torch.save` makes of a state dict.

    Args:
        model: the network, or its state dict.
        path: the file; its folder is made if need be.
        layout: "native", the names of the model; or "released", the layout of the authors' files, in-place ABN scales
            included (HRNet and GSTO-HRNet with `gate_form="released"`). Loaded again, either gives the same output, bit for bit
            (in float32, in-place ABN cannot express half of the scales from 7.1e-5 to 1.2e-4: those are 7e-8 of them off).

    Returns:
        The path.

    Raises:
        ValueError: an unknown layout, or a network that the layout cannot hold, with the reason.
        ModuleNotFoundError: a .safetensors file without the package safetensors.
    """
    path = Path(path)
    state_dict = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = {name: t.detach().cpu().contiguous() for name, t in to_layout(state_dict, layout).items()}
    if path.suffix == ".safetensors":
        write = _safetensors(path).torch.save_file
    else:
        write = torch.save
    path.parent.mkdir(parents=True, exist_ok=True)
    write(tensors, path)
    return path


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        safetensors = _safetensors(path)
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"not a file of tensors: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what an unpickler meets in other bytes: IndexError, KeyError, UnicodeDecodeError, ...
        raise ValueError(f"not a file of tensors (it is read with weights_only=True): {error}") from error


def _safetensors(path: Path) -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs the package safetensors: pip install safetensors") from error
    return safetensors


def _like_model(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A bare backbone's names fitted to a model that has it as a part called "backbone", or the other way round."""
    inside, given = (any(name.startswith("backbone.") for name in names) for names in (own, tensors))
    if inside and not given:
        return {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    if given and not inside:
        return {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    return tensors


def _check_gates(tensors: StateDict, own: StateDict, contents: Contents, min_matched: float) -> None:
    """A file's gates must find their places: a network with other gates than it was trained with gives wrong output."""
    given, wanted = gate_names(tensors), gate_names(own)
    if not given or given == wanted:
        return
    what = f"the file looks like {contents.looks_like}"
    form, own_form = gate_form_of(given), gate_form_of(wanted)
    if form and own_form and form != own_form:
        raise ValueError(f"{what}, the model has gate_form={own_form!r}: create the model with gate_form={form!r}")
    if form and own_form and has_gate_bias(given) != has_gate_bias(wanted):
        wish, has = ("a number for gate_bias_init", "a") if has_gate_bias(given) else ("gate_bias_init=None", "no")
        raise ValueError(f"{what}, and its gates have {has} bias: create the model with {wish}")
    if min_matched > 0:
        raise ValueError(
            f"{what}, and the model is {describe(own)} with other gates (only in the file: {_some(sorted(given - wanted), 2)}; "
            f"only in the model: {_some(sorted(wanted - given), 2)}): create the model with the gates that the file has "
            f"(options gated_fusion, gated_transition, transition_form, gate_kind, gate_position, gate_bias_init; gate on "
            f"ResNet-50), or take what fits with min_matched=0"
        )


def _start_gates(model: nn.Module, contents: Contents, absorb: bool) -> str:
    if isinstance(model, HRNet) and contents.family == "HRNet" and model.options.gate_bias_init is not None:
        if absorb:
            absorb_initial_gates(model)
            return (
                "weights without gates: the gates start open, and their first value was absorbed (absorb_initial_gates)"
            )
        return "weights without gates: the gates start open; absorb_initial_gates(model) would keep the file's output"
    return "weights without gates: the gates are fresh (with gate_bias_init=4.0 the network starts out as the file's)"


def _some(names: list[str], count: int = 6) -> str:
    more = f", and {len(names) - count} more" if len(names) > count else ""
    return f"{len(names)} ({', '.join(names[:count])}{more})"
