"""Explains failures of the machine, as opposed to those of the program: memory, disk, data-loading processes."""

from __future__ import annotations

import errno

import torch

_NO_HOST_MEMORY = ("DefaultCPUAllocator", "Cannot allocate memory")


def explain(error: BaseException, batch_size: int, folder: str) -> str | None:
    """What to tell the user about an error, or None if it is none of the machine's.

    Args:
        error: what a run failed with.
        batch_size: images that a process took at once.
        folder: of the run.
    """
    text = str(error)
    first_line = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    go_on = f"what was trained up to the last checkpoint in {folder} is not lost: repeat the command with --resume"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"too little GPU memory for batches of {batch_size} images ({first_line}). Lower data.batch_size (with "
            "global_batch_size set, the images of a step stay the same, in more batches), or set trainer.precision to "
            f"bf16-mixed, or take smaller crops; {go_on}"
        )
    if isinstance(error, MemoryError) or any(words in text for words in _NO_HOST_MEMORY):
        return (
            f"too little main memory for batches of {batch_size} images ({first_line}). Lower data.batch_size or "
            f"data.num_workers, or take smaller crops; {go_on}"
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return (
            f"a data-loading process was ended from outside, as a rule for want of (shared) memory ({first_line}). Lower "
            f"data.num_workers or data.batch_size, or enlarge /dev/shm; {go_on}"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space to write to ({first_line}). Make room; then {go_on}"
    return None
