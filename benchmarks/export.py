"""`gsto export`: a network as an ONNX file or as a program of torch.export, which run without this package."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gsto_models

from .errors import ExportError, UsageError
from .networks import load_network

SUFFIXES = (".onnx", ".pt2")
TOLERANCE = 1e-4  # of the largest value of the output
AXES = {0: "batch", 2: "height", 3: "width"}
OPEN = {"all": tuple(AXES), "batch": (0,), "none": ()}


@torch.no_grad()
def export_network(network: nn.Module, out: Path, size: tuple[int, int], *, open_axes: str = "all") -> str:
    """Fold a network, write it, read the file back and compare it with the network.

    Args:
        network: a network of `gsto_models`, on the CPU, in eval mode. Not changed.
        out: the file; `.onnx`, or `.pt2` for `torch.export.load`. Both hold standard operators alone.
        size: height and width of the images that the network is traced with.
        open_axes: "all" leaves the number of images, their height and width open; "batch" the number alone; "none" nothing.

    Returns:
        What was written, which sizes it takes, and the differences from the network in float64.

    Raises:
        ValueError: another suffix; a network in training mode, or one that cannot be traced with these axes open.
        ExportError: the file computes something else. It is removed.
        ModuleNotFoundError: the packages that ONNX needs are missing.
    """
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: the file must end in {' or '.join(SUFFIXES)}")
    if out.suffix == ".onnx":
        _need_onnx()
    folded = gsto_models.fold(network).float()
    axes = dict.fromkeys(OPEN[open_axes], torch.export.Dim.AUTO)
    image = torch.randn(2 if axes else 1, 3, *size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _quiet_exporters():
        program = _trace(folded, image, axes)
        if out.suffix == ".pt2":
            torch.export.save(program, out)
        else:
            torch.onnx.export(program, input_names=["image"], output_names=["output"], verbose=False).save(out)
    left_open = _open_axes(program)
    others = [(1, 3, size[0] + 32, size[1]), (3, 3, size[0] + 7, size[1] + 19)]  # odd ones where they are allowed
    shapes = [tuple(n if dim in left_open else image.shape[dim] for dim, n in enumerate(other)) for other in others]
    try:
        checked = _check(_runner(out), network, list(dict.fromkeys([tuple(image.shape), *shapes])))
    except ExportError as error:
        out.unlink()
        raise ExportError(f"{out} is removed: {error}") from None
    names = [[name for dim, name in AXES.items() if (dim in left_open) == is_open] for is_open in (True, False)]
    return "\n".join(
        [
            f"{out}: {sum(p.numel() for p in folded.parameters()):,} parameters, {out.stat().st_size / 2**20:.1f} MiB",
            "; ".join(f"{word}: {', '.join(n) or 'nothing'}" for word, n in zip(("open", "fixed"), names, strict=True)),
            *checked,
        ]
    )


def _trace(network: nn.Module, image: Tensor, axes: dict[int, Any]) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(network, (image,), dynamic_shapes=(axes,))
    except Exception as error:  # torch's solver of constraints raises anything, sympy's errors among them
        if not axes:
            raise
        names = ", ".join(AXES[axis] for axis in axes)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the network cannot be traced with open {names}; choose fewer (--open batch or none): {reason}"
        ) from error


def _need_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"ONNX needs {', '.join(missing)}: pip install 'gsto_ops[export]'")


@contextlib.contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Without the exporters' remarks about themselves: packages that are not installed, their own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _open_axes(program: torch.export.ExportedProgram) -> set[int]:
    """The axes of the image that tracing has left open."""
    name = program.graph_signature.user_inputs[0]
    shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == name)
    return {dim for dim in AXES if not isinstance(shape[dim], int)}


def _runner(out: Path) -> Callable[[Tensor], Tensor]:
    """What a file computes."""
    if out.suffix == ".pt2":
        return torch.export.load(out).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _check(run: Callable[[Tensor], Tensor], network: nn.Module, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """The largest difference for every shape. A network that float32 itself does not carry that far may differ as much again."""
    exact = copy.deepcopy(network).double()
    lines = []
    for shape in shapes:
        image = torch.randn(shape)
        expected = exact(image.double())
        program, own = (float((f(image) - expected).abs().max() / expected.abs().max()) for f in (run, network))
        line = (
            f"{'x'.join(map(str, shape))}: differs from the network in float64 by {program:.1e} of its largest output "
            f"(the network in float32: {own:.1e})"
        )
        if not program <= max(TOLERANCE, 4 * own):
            raise ExportError(f"the exported program is wrong: {line}")
        lines.append(line)
    return lines


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or min(map(int, match.groups())) < 32:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, both at least 32, got {text!r}")
    return int(match[1]), int(match[2])


def run(argv: Sequence[str], description: str) -> None:
    """The command; prints what `export_network` returns.

    Raises:
        UsageError: what `load_network` and `export_network` raise for a wrong command. ExportError: as `export_network`.
    """
    parser = argparse.ArgumentParser(prog="gsto export", description=description, allow_abbrev=False)
    parser.add_argument("output", metavar="OUT", type=Path, help="file to write: .onnx, or .pt2 for torch.export.load")
    parser.add_argument("--model", help="name of the network; not needed for a checkpoint of gsto fit or gsto demo")
    parser.add_argument("--ckpt", type=Path, help="its weights, of any layout that gsto convert reads (default: fresh)")
    parser.add_argument("--task", choices=("segmentation", "pose"), help="of the network (default: the file's)")
    parser.add_argument("--num-classes", type=int, help="output channels (default: the file's, or the task's)")
    parser.add_argument("--size", type=_size, default=(128, 256), help="HxW to trace with (default: 128x256)")
    parser.add_argument(
        "--open", choices=OPEN, default="all", help="axes that stay open: batch, height, width; batch; none"
    )
    arguments = parser.parse_args(argv)
    try:
        network = load_network(arguments.model, arguments.ckpt, task=arguments.task, num_classes=arguments.num_classes)
        print(export_network(network, arguments.output, arguments.size, open_axes=arguments.open))
    except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error
