"""`gsto visualize`: what networks compute on images, as pictures; two networks stand side by side."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor, nn

import gsto_models
import gsto_ops

from .errors import UsageError
from .images import normalize
from .networks import load_network
from .quiet import quieten
from .segmentation.montage import Panel, save_montage


@dataclass
class Insight:
    """What a network computed on one image; maps are (H, W) float32 at their own resolution.

    Attributes:
        branches: stage -> the mean over the channels of every branch's output, highest resolution first (the paper's Fig. 1).
        gates: the gate's name in the network -> gate, 0 to 1.
        class_maps: name of the predictor -> the most likely class of every pixel; for pose the strongest heatmap.
        prediction: the same of the output, at the size of the image.
        pose: whether the network is for pose.
    """

    branches: dict[str, list[np.ndarray]] = field(default_factory=dict)
    gates: dict[str, np.ndarray] = field(default_factory=dict)
    class_maps: dict[str, np.ndarray] = field(default_factory=dict)
    prediction: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    pose: bool = False


@torch.inference_mode()
def look(network: nn.Module, image: np.ndarray) -> Insight:
    """Run a network in eval mode on an RGB image (H, W, 3) uint8 and keep what it computed on the way."""
    insight = Insight(pose=getattr(network, "head_name", "") == "final_layer")
    pixels = normalize(torch.from_numpy(image)[None])
    with _watching(network, insight), gsto_models.record_gates(network) as gates:
        logits = network(pixels)
    insight.gates = {name: gate[0, 0].numpy() for name, gate in gates.items()}
    insight.prediction = _summary(gsto_ops.scale_transfer(logits, size=image.shape[:2]), insight.pose)
    return insight


def _summary(maps: Tensor, pose: bool) -> np.ndarray:
    return (maps[0].amax(0) if pose else maps[0].argmax(0)).numpy()


@contextmanager
def _watching(network: nn.Module, insight: Insight) -> Iterator[None]:
    """Hooks that fill branches and class maps while the context is open."""

    def watch_branches(name: str, module: nn.Module, args: tuple, output: Tensor | list[Tensor]) -> None:
        branches = output if isinstance(output, list) else [output]
        insight.branches[name] = [branch[0].mean(0).numpy() for branch in branches]

    def watch_classes(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        insight.class_maps[name] = _summary(output, insight.pose)

    def watch_feature(name: str, module: Any, args: tuple, output: Tensor) -> None:
        watch_classes(name, module, args, module.predictor(args[0]))  # in eval mode its gates make do without it

    modules = dict(network.named_modules())
    stages = [name for name in ("stage2", "stage3", "stage4") if name in modules]
    stages = stages or [f"backbone.layer{k}" for k in range(1, 5) if f"backbone.layer{k}" in modules]
    predictors = [name for name in modules if re.fullmatch(r"last_layer_stage\d|(.*\.)?predictor", name)]
    handles = [modules[name].register_forward_hook(partial(watch_branches, name)) for name in stages]
    for name in predictors:
        if name == "head.predictor":
            handles.append(modules["head"].register_forward_hook(partial(watch_feature, name)))
        else:
            handles.append(modules[name].register_forward_hook(partial(watch_classes, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def visualize(networks: dict[str, nn.Module], images: Sequence[Path], out: Path) -> list[Path]:
    """Write pictures of what networks compute: for every image `<image>_branches.png`, `_gates.png` and `_predictions.png`.

    Args:
        networks: title -> network; several stand side by side.
        images: image files.
        out: folder of the pictures.

    Returns:
        The files. There is no picture of gates if no network has any.

    Raises:
        FileNotFoundError: no such image.
        ValueError: not an image, one too small for a network, or two of the same name.
    """
    names = [path.stem for path in images]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} images are called {name}: their pictures would have the same names")
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for path in images:
        image = _read_image(path)
        insights = {title: look(network, image) for title, network in networks.items()}
        for name, blocks in (
            ("branches", [_branch_panels(image, insight) for insight in insights.values()]),
            ("gates", [_gate_panels(insight) for insight in insights.values()]),
            ("predictions", [_prediction_panels(image, insight) for insight in insights.values()]),
        ):
            kept = [(title, rows) for title, rows in zip(insights, blocks, strict=True) if rows]
            if kept:
                written.append(save_montage(out / f"{path.stem}_{name}.png", kept, image.shape[:2]))
    return written


def _branch_panels(image: np.ndarray, insight: Insight) -> list[list[Panel]]:
    height = image.shape[0]
    rows = [[Panel("image", image)]]
    for stage, branches in insight.branches.items():
        scales = [f"{stage}, 1/{2 ** round(math.log2(height / branch.shape[0]))}" for branch in branches]
        rows.append([Panel(title, branch, "heat") for title, branch in zip(scales, branches, strict=True)])
    if all(len(row) == 1 for row in rows):  # a backbone without parallel branches
        return [[row[0] for row in rows]]
    return rows


def _gate_panels(insight: Insight) -> list[list[Panel]]:
    """One row per target branch of a fusion, its sources side by side; the other gates of a module share a row."""
    rows: dict[str, list[Panel]] = {}
    for name, gate in insight.gates.items():
        target, _, source = name.rpartition(".")
        row, title = target, name
        if ".att_layers." in name:
            title = f"{target.replace('.att_layers.', ': ')} from {source}"
        elif name.startswith(("att", "transition")):
            row = "transitions"
        rows.setdefault(row, []).append(Panel(title, gate, "gate"))
    return list(rows.values())


def _prediction_panels(image: np.ndarray, insight: Insight) -> list[list[Panel]]:
    kind: Literal["heat", "classes"] = "heat" if insight.pose else "classes"
    panels = [Panel("image", image)]
    panels += [Panel(f"class map, {name}", classes, kind) for name, classes in insight.class_maps.items()]
    return [[*panels, Panel("prediction", insight.prediction, kind)]]


def _read_image(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image")
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR) if path.stat().st_size else None
    if pixels is None:
        raise ValueError(f"{path}: not an image that can be decoded")
    return np.ascontiguousarray(pixels[..., ::-1])


def run(argv: Sequence[str], description: str) -> None:
    """The command; prints the files it wrote.

    Raises:
        UsageError: a network, a checkpoint or an image that cannot be had, or options that do not go together.
    """
    parser = argparse.ArgumentParser(prog="gsto visualize", description=description, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a network of gsto_models.list_models()")
    parser.add_argument("--ckpt", type=Path, help="its weights (default: fresh ones)")
    parser.add_argument("--compare", metavar="MODEL2", help="a second network, shown beside the first")
    parser.add_argument("--ckpt2", type=Path, help="weights of the second network")
    parser.add_argument("--image", type=Path, nargs="+", required=True, help="image files")
    parser.add_argument("--out", type=Path, default=Path("runs/visualize"), help="folder (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.ckpt2 is not None and arguments.compare is None:
        raise UsageError("--ckpt2 needs --compare MODEL2: the network that the weights are for")
    quieten()
    try:
        networks = {arguments.model: load_network(arguments.model, arguments.ckpt)}
        if arguments.compare is not None:
            title = arguments.compare if arguments.compare not in networks else f"{arguments.compare} (2)"
            networks[title] = load_network(arguments.compare, arguments.ckpt2)
        for file in visualize(networks, arguments.image, arguments.out):
            print(file)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error
