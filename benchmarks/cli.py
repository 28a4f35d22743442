"""The `gsto` command line."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import gsto_ops.backends

from .configs import resolve_config_names, shipped_configs
from .errors import ExportError, TrainingError, UsageError

COMMANDS = {
    "demo": "train a GSTO-HRNet on generated street scenes and show what it learned, in minutes",
    "fit": "train: gsto fit -c CONFIG [--key value ...]",
    "prepare": "make a data set ready for training: convert it, list its files, check them",
    "verify": "check a data set file by file",
    "validate": "evaluate: gsto validate -c CONFIG --ckpt_path FILE [--key value ...]",
    "test": "predict a test set, as files to submit: gsto test -c CONFIG --ckpt_path FILE [--key value ...]",
    "predict": "predict a folder of images: gsto predict -c CONFIG --ckpt_path FILE --data.images FOLDER",
    "compare": "put runs side by side: gsto compare RUN RUN ...",
    "visualize": "show what networks compute on images: branches, gates, class maps, predictions",
    "convert": "rewrite a weight file: published layouts, in-place ABN, safetensors",
    "export": "write a network as ONNX or as a torch.export program, checked against the network itself",
    "bench": "measure operators, networks and data loading: gsto bench WHAT",
    "info": "what is built, what will run here, and why",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or after lines about it 2 (bad command or data) or 1 (failed run or check)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else ""
    if command in ("", "-h", "--help"):
        print(_help())
        return 0 if command else 2
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"gsto: no such command: {command!r}{hint}\n\n{_help()}", file=sys.stderr)
        return 2
    if command == "info":
        argparse.ArgumentParser(prog="gsto info", description=COMMANDS["info"]).parse_args(argv[1:])
        print(gsto_ops.backends.report())
        return 0
    try:
        if command == "convert":
            from .convert import run

            run(argv[1:], COMMANDS["convert"])
        elif command == "export":
            from .export import run

            run(argv[1:], COMMANDS["export"])
        elif command == "bench":
            from .bench.command import run as run_bench

            return run_bench(argv[1:])
        else:
            return _run_with_trainers(command, argv)
    except UsageError as error:
        print(f"gsto: {error}", file=sys.stderr)
        return 2
    except (ExportError, TrainingError) as error:
        print(f"gsto: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"gsto: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _run_with_trainers(command: str, argv: list[str]) -> int:
    if importlib.util.find_spec("lightning") is None:
        raise UsageError(f"{command} needs the trainers: pip install 'gsto_ops[train]'")
    # the trainers are imported only where they are used: `gsto info` and the help work without them, and at once
    if command == "demo":
        _demo(argv[1:])
    elif command == "visualize":
        from .visualize import run

        run(argv[1:], COMMANDS["visualize"])
    elif command == "compare":
        from .training.compare import run

        run(argv[1:], COMMANDS["compare"])
    elif command == "verify" and argv[1:2] == ["coco"]:
        from .pose.verification import run_verify

        return run_verify(argv[2:], COMMANDS["verify"])
    elif command in ("prepare", "verify"):
        from .segmentation.prepare import run_prepare, run_verify

        return {"prepare": run_prepare, "verify": run_verify}[command](argv[1:], COMMANDS[command])
    else:
        from .training.cli import run_cli

        run_cli(resolve_config_names(argv))
    return 0


def _help() -> str:
    lines = ["usage: gsto COMMAND [options]      (gsto COMMAND --help tells more)", ""]
    lines += [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    shipped = textwrap.fill(f"shipped configurations for -c: {', '.join(shipped_configs())}", 120)
    return "\n".join([*lines, "", shipped])


def _demo(argv: list[str]) -> None:
    from .demo import DemoOptions, run_demo

    default = DemoOptions()
    parser = argparse.ArgumentParser(prog="gsto demo", description=COMMANDS["demo"], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=default.out, help="folder of the results (default: %(default)s)")
    parser.add_argument("--epochs", type=_positive, default=default.epochs, help="default: %(default)s")
    parser.add_argument("--scenes", type=_positive, default=default.scenes, help="for training (default: %(default)s)")
    parser.add_argument(
        "--seed", type=_natural, default=default.seed, help="of scenes and weights (default: %(default)s)"
    )
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    run_demo(DemoOptions(**vars(parser.parse_args(argv))))


def _positive(text: str) -> int:
    return _integer(text, 1)


def _natural(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, low: int) -> int:
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"must be an integer >= {low}, got {text!r}")
    return int(text)
