"""How a global batch is shared among processes and accumulated."""

from __future__ import annotations

from ..errors import UsageError


def share_batch(global_size: int, largest: int, processes: int) -> tuple[int, int]:
    """Images that a process takes at once, and how many such batches it accumulates for one optimizer step.

    Args:
        global_size: images per step over all processes.
        largest: a process takes at most so many at once.
        processes: number of processes (GPUs).

    Raises:
        UsageError: the processes cannot take equal shares.
    """
    share, rest = divmod(global_size, processes)
    if share < 1 or rest:
        raise UsageError(f"global_batch_size {global_size} cannot be shared equally by {processes} processes")
    accumulate = next(count for count in range(1, share + 1) if share % count == 0 and share // count <= largest)
    return share // accumulate, accumulate
