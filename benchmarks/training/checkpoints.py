"""Checkpoints that survive a kill at any moment, a full disk and a damaged file.

A run's folder holds `last.ckpt`, the one before it, `previous.ckpt`, and `best.ckpt`. A checkpoint is written beside its
name, synchronised with the disk and then renamed, so that a name never stands for half a file.
"""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ..errors import TrainingError

NEXT, LAST, PREVIOUS = "next.ckpt", "last.ckpt", "previous.ckpt"
# Between looks at the clock where several processes must agree on the time: an agreement costs a small all-reduce
_STEPS_PER_LOOK = 20


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all.

    A disk that is full is reported and nothing else: the run in memory is the only copy of its progress, so it goes on,
    and the next checkpoint is tried as usual.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch turns a failed write of its own into a RuntimeError
            partial.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free / 2**20
            rank_zero_warn(
                f"{path} could not be written ({_root_cause(error)}; {free:,.0f} MiB free in {path.parent}); training goes on "
                "with the checkpoints that are there, and the next one is tried as planned"
            )


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` and keeps the one before as `previous.ckpt`.

    A checkpoint is written after the given time or number of optimizer steps, in mid-epoch as well; when the process is
    asked to end by SIGTERM, which is what SLURM and cloud machines send; and at the end of the run.

    Args:
        folder: of the run.
        minutes: time between checkpoints; None for no such rule.
        steps: optimizer steps between checkpoints; None for no such rule.

    Raises:
        ValueError: `minutes` or `steps` is not positive.
        TrainingError: at the end of the run, when the last checkpoint cannot be written.
    """

    def __init__(self, folder: Path, minutes: float | None = 10.0, steps: int | None = None) -> None:
        for name, value in (("checkpoint_minutes", minutes), ("checkpoint_steps", steps)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0 or null, got {value}")
        self.folder, self.minutes, self.steps = folder, minutes, steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock, self._step, self._written = time.monotonic(), trainer.global_step, True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not between a step's accumulated batches, whose gradients are not in a checkpoint, and not where an evaluation
        # follows: a run that is resumed here would leave it out. Then the next step is soon enough.
        evaluates = (batch_idx + 1) % trainer.val_check_batch == 0 if trainer.val_check_batch else False
        if (
            _step_is_complete(trainer, batch_idx)
            and not trainer.is_last_batch
            and not evaluates
            and self._is_due(trainer)
        ):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs or _is_last_step(trainer)
        # a run that ends by max_steps in mid-epoch has its checkpoint from there, and so can go on with that epoch
        if (ends and trainer.global_step > self._step) or self._is_due(trainer):
            self._save(trainer)
        if ends and not self._written:
            raise TrainingError(f"the run is over, but {self.folder / LAST} could not be written: see above")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning raises it between two batches, in all processes at the same one
        if not isinstance(exception, SIGTERMException) or not trainer.training or trainer.global_step == self._step:
            return
        if _step_is_complete(trainer, trainer.fit_loop.epoch_loop.batch_idx):
            self._save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        steps = trainer.global_step - self._step
        if _is_last_step(trainer) or (self.steps is not None and steps >= self.steps):
            return steps > 0
        if self.minutes is None or (trainer.world_size > 1 and steps % _STEPS_PER_LOOK):
            return False
        late = time.monotonic() - self._clock >= 60 * self.minutes
        return trainer.strategy.reduce_boolean_decision(late, all=False)

    def _save(self, trainer: Trainer) -> None:
        trainer.lightning_module.loss_watch.check()  # never overwrite good weights by spoilt ones
        if trainer.is_global_zero:
            _rotate(self.folder)  # where a kill came between a write and its rotation
        trainer.save_checkpoint(self.folder / NEXT, weights_only=False)
        self._written = _rotate(self.folder) if trainer.is_global_zero else True
        self._clock, self._step = time.monotonic(), trainer.global_step


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder; None if it has none at all. Damaged ones are reported.

    Raises:
        TrainingError: there are checkpoints, but every one is damaged.
    """
    damaged = []
    for name in (NEXT, LAST, PREVIOUS):  # "next" is complete, but a kill came before it was renamed
        file = folder / name
        if not file.exists():
            continue
        fault = checkpoint_fault(file)
        if fault is None:
            if damaged:
                rank_zero_warn(f"{'; '.join(damaged)}; the one before is used: {file}")
            return file
        damaged.append(f"{file} is damaged ({fault})")
    if damaged:
        raise TrainingError(f"{'; '.join(damaged)}: no checkpoint to go on from; to start over, remove them")
    return None


def checkpoint_fault(file: Path) -> str | None:
    """What is wrong with a checkpoint file, whose parts carry check sums; None for a whole one."""
    try:
        with zipfile.ZipFile(file) as parts:
            bad = parts.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return str(error) or type(error).__name__
    return None if bad is None else f"wrong check sum of {bad}"


def _rotate(folder: Path) -> bool:
    """Make next.ckpt the last one; False if there is none."""
    if not (folder / NEXT).exists():
        return False
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
    os.replace(folder / NEXT, folder / LAST)
    _sync_folder(folder)
    return True


def _is_last_step(trainer: Trainer) -> bool:
    return 0 < trainer.max_steps <= trainer.global_step


def _step_is_complete(trainer: Trainer, batch_idx: int) -> bool:
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and renames are durable by themselves
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _root_cause(error: BaseException) -> BaseException:
    while error.__context__ is not None:
        error = error.__context__
    return error
