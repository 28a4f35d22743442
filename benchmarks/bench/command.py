"""The commands of ``gsto bench``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ..errors import UsageError

# name -> (module, its function (argv, description) -> exit status, description)
BENCHES = {
    "ops": ("ops", "run", "time every operator against its floor, eager PyTorch and torch.compile"),
    "step": ("step", "run", "time a training step of a network with gates against the network without them"),
    "infer": ("step", "run_inference", "the same for inference"),
    "scaling": ("scaling", "run", "time a training step over batch, resolution and width; count what GPUs send"),
    "traffic": ("traffic", "run", "count the bytes that a training step reads and writes; nothing is computed"),
    "loading": ("loading", "run", "images per second that one core decodes and augments, and a loader delivers"),
    "feed": ("feed", "run", "train some steps of a configuration: how long does it wait for its images?"),
    "summary": ("summary", "run", "the results in a folder on one screen"),
    "compare": ("compare", "run", "two results or two git revisions, row by row; status 1 where a row became slower"),
}


def run(argv: Sequence[str]) -> int:
    """Run one of them; returns the exit status.

    Raises:
        UsageError: no such benchmark, options that it does not take, or a package that is missing.
    """
    what = argv[0] if argv else ""
    if what in ("-h", "--help"):
        lines = [f"  {name:<10}{description}" for name, (*_, description) in BENCHES.items()]
        print("\n".join(["usage: gsto bench WHAT [options]      (gsto bench WHAT --help tells more)", "", *lines]))
        return 0
    if what not in BENCHES:
        given = f", got {what!r}" if what else ""
        raise UsageError(f"bench needs one of {', '.join(BENCHES)}{given}")
    module, function, description = BENCHES[what]
    try:
        benchmark = importlib.import_module(f"{__package__}.{module}")
    except ModuleNotFoundError as error:
        raise UsageError(f"bench {what} needs the package {error.name}: pip install 'gsto_ops[train]'") from error
    return getattr(benchmark, function)(argv[1:], description)
