"""`gsto convert`: a weight file in, the same weights in another layout out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gsto_models import read_checkpoint, save_checkpoint
from gsto_models.layouts import LAYOUTS, SOURCES

from .errors import UsageError


def convert_file(source_file: Path, out: Path, layout: str = "native", source: str = "auto") -> str:
    """Read weights of any layout that `gsto_models.load_checkpoint` knows and write them in another one.

    Args:
        source_file: the file to read.
        out: the file to write; safetensors by the suffix .safetensors.
        layout: "native" or "released"; see `gsto_models.save_checkpoint`.
        source: the convention of the normalisation weights; see `gsto_models.load_checkpoint`.

    Returns:
        What the file was, what was assumed and left out, and what was written.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: as `gsto_models.load_checkpoint` and `save_checkpoint`.
    """
    contents = read_checkpoint(source_file, source)
    save_checkpoint(contents.tensors, out, layout)
    lines = [f"{source_file} looks like {contents.looks_like}", contents.assumption]
    lines += [f"left out, {reason}: {len(names)} tensors" for reason, names in contents.ignored.items()]
    return "\n".join([*lines, f"{out}: {len(contents.tensors)} tensors, {layout} layout"])


def run(argv: Sequence[str], description: str) -> None:
    """The command; prints what `convert_file` returns.

    Raises:
        UsageError: what `convert_file` raises.
    """
    parser = argparse.ArgumentParser(prog="gsto convert", description=description, allow_abbrev=False)
    parser.add_argument("input", metavar="IN", type=Path, help="weight file: .pth, .ckpt, ... or .safetensors")
    parser.add_argument(
        "output", metavar="OUT", type=Path, help="file to write; safetensors by its suffix .safetensors"
    )
    parser.add_argument("--to", choices=LAYOUTS, default=LAYOUTS[0], help="layout of OUT (default: %(default)s)")
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default=SOURCES[0],
        help="how IN's normalisation scales (default: a guess by its names)",
    )
    arguments = parser.parse_args(argv)
    try:
        print(convert_file(arguments.input, arguments.output, arguments.to, arguments.source))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error
