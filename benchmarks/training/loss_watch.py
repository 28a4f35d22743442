"""Stops a run whose loss is not finite, without making a GPU wait for the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from ..errors import TrainingError


class LossWatch:
    """Looks at every loss: on a CPU at once, on a GPU one step later, when the answer has arrived by itself.

    Asking at once would make the GPU wait for the launches of the backward pass in every step. The price: a bad loss is
    noticed after one more step, with weights that its gradients have already spoilt; nobody may save them, which is why
    `Checkpoints` calls `check` first.

    Args:
        folder: where the batch with a bad loss is saved.
        rank: of this process, part of the file's name.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self._pending: tuple[Tensor, Tensor, Any, int, int] | None = None
        self._arrived: torch.cuda.Event | None = None

    def put(self, loss: Tensor, batch: Any, step: int, batch_idx: int) -> None:
        """Watch a loss (a scalar) and the batch that it is of.

        Raises:
            TrainingError: this loss (on a CPU) or the one before is NaN or infinite.
        """
        self.check()
        finite = torch.isfinite(loss).to("cpu", non_blocking=True)
        self._pending = (finite, loss, batch, step, batch_idx)
        if loss.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self.check()

    def check(self) -> None:
        """Wait for the answer about the latest loss; raises as `put` does."""
        if self._pending is None:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        (finite, loss, batch, step, batch_idx), self._pending = self._pending, None
        if finite:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"bad_batch_step{step}_rank{self.rank}.pt"
        names = [str(name) for name in batch[-1]]
        saved = {"batch": move_data_to_device(batch, "cpu"), "loss": loss.item(), "step": step, "batch_idx": batch_idx}
        torch.save(saved, file)
        raise TrainingError(
            f"the loss is {loss.item()} at step {step}, batch {batch_idx} of the epoch ({', '.join(names)}); the batch is "
            f"saved as {file}. A lower model.lr or gradient clipping (trainer.gradient_clip_val) may help; --resume goes "
            "on from the last checkpoint"
        )
