"""Warnings and notices of the trainers' libraries that a user of `gsto` can do nothing about."""

from __future__ import annotations

import logging
import warnings

_EXPECTED = (
    r"(?s).*(deprecated in v4|JsonargparseDeprecationWarning)",  # Lightning's use of jsonargparse
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning's use of torch
    r".*does not have many workers",  # the number of workers was chosen for the machine, or by the user
    r".*Checkpoint directory .* exists and is not empty",  # one folder holds everything about a run
    r".*callbacks used to create the checkpoint need to be provided",  # evaluation writes no report
)


def quieten() -> None:
    """Ignore the expected warnings, and Lightning's advertisement, in this process."""
    for pattern in _EXPECTED:
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
