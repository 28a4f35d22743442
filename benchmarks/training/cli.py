"""`gsto fit`, `validate`, `test` and `predict`: LightningCLI with a run folder that a run can be continued from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionYesNo, ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..errors import DataError, TrainingError, UsageError
from ..quiet import quieten
from .averaging import ExponentialMovingAverage
from .batches import share_batch
from .checkpoints import AtomicCheckpointIO, Checkpoints, checkpoint_fault, newest_checkpoint
from .data import TrainingData
from .plan import make_plan
from .progress import Progress
from .table import MetricsTable
from .task import TrainingTask
from .trouble import explain


class TrainingCLI(LightningCLI):
    """`fit` leaves everything in `trainer.default_root_dir`: config.yaml, best.ckpt (by the task's headline metric),
    last.ckpt, previous.ckpt, metrics.csv, TensorBoard's files, and what the task's reports write."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate", "test", "predict")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.add_argument(
            "--resume",
            action=ActionYesNo(no_prefix="no_"),
            default=False,
            help="go on from the newest whole checkpoint of the run's folder; begin where there is none",
        )
        parser.add_argument(
            "--dry_run",
            action=ActionYesNo(no_prefix="no_"),
            default=False,
            help="print what the run would take: steps, images, memory, time; trainer.devices and num_nodes are taken at "
            "their word",
        )
        parser.add_argument(
            "--global_batch_size",
            type=int | None,
            default=None,
            help="images per optimizer step over all processes. Each takes at most data.batch_size at once and accumulates "
            "gradients over several batches if need be. Default: data.batch_size x number of processes",
        )
        parser.add_argument(
            "--ema_decay",
            type=float | None,
            default=None,
            help="evaluate and save an exponential average of the weights",
        )
        parser.add_argument(
            "--checkpoint_minutes", type=float | None, default=10.0, help="time between checkpoints, in mid-epoch too"
        )
        parser.add_argument(
            "--checkpoint_steps", type=int | None, default=None, help="optimizer steps between checkpoints"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        # Lightning's own method would warn about arguments given as a list
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UsageError(in_short(str(error))) from error

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the hyperparameters stored in the checkpoint override the configuration and the command
        # line, so that a run could not be resumed with another learning rate. Here what the user writes counts.
        pass

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if self.subcommand == "fit":
            self._choose_checkpoint(config)
        elif config.ckpt_path is None:
            raise UsageError(f"{self.subcommand} needs --ckpt_path FILE: the checkpoint to evaluate")
        if self.subcommand == "predict":
            config.return_predictions = False  # they are written image by image, and not kept
        if config.ckpt_path is None:
            return
        if not Path(config.ckpt_path).is_file():
            raise UsageError(f"--ckpt_path {config.ckpt_path}: no such file")
        fault = checkpoint_fault(Path(config.ckpt_path))
        if fault is not None:
            raise UsageError(f"--ckpt_path {config.ckpt_path}: the file is damaged ({fault})")

    def _choose_checkpoint(self, config: Any) -> None:
        """Where a run goes on from; a folder with a run in it is never overwritten."""
        folder = Path(config.trainer.default_root_dir)
        if config.resume and config.ckpt_path is not None:
            raise UsageError("--resume finds the checkpoint by itself: give either --resume or --ckpt_path")
        if not config.resume and config.ckpt_path is None and any(folder.glob("*.ckpt")):
            raise UsageError(
                f"{folder} holds the checkpoints of a run: continue it with --resume, or begin another one with "
                "--trainer.default_root_dir FOLDER"
            )
        if config.resume:
            newest = newest_checkpoint(folder)
            rank_zero_info(f"{folder}: no checkpoint yet, a new run" if newest is None else f"Going on from {newest}")
            config.ckpt_path = None if newest is None else str(newest)

    def instantiate_classes(self) -> None:
        try:
            if self._is_dry_run:
                self._plan()
            else:
                super().instantiate_classes()
        except (ValueError, TypeError) as error:  # an argument of a constructor that its type alone does not rule out
            raise UsageError(in_short(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        folder = Path(config.trainer.default_root_dir)
        callbacks = [] if config.trainer.enable_progress_bar is False else [Progress()]
        callbacks += config.trainer.callbacks or []
        plugins = config.trainer.plugins or []
        plugins = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        logger = config.trainer.logger
        if self.subcommand == "fit":
            if config.ema_decay is not None:
                callbacks.append(ExponentialMovingAverage(config.ema_decay))
            best = ModelCheckpoint(folder, "best", self.model.headline, mode="max", enable_version_counter=False)
            last = Checkpoints(folder, config.checkpoint_minutes, config.checkpoint_steps)
            callbacks += [*self.model.make_reports(folder), best, last]
            if logger is None:
                logger = [MetricsTable(folder), TensorBoardLogger(folder, "tensorboard", version="")]
        else:
            self.save_config_callback = None  # evaluating must not change the record of the training run
            callbacks += self.model.make_evaluation_reports(folder / self.subcommand)
            logger = False
        trainer = super().instantiate_trainer(callbacks=callbacks, logger=logger, plugins=plugins, **kwargs)
        if self.subcommand == "fit" and config.global_batch_size is not None:
            if trainer.accumulate_grad_batches != 1:
                raise UsageError(
                    "global_batch_size decides about trainer.accumulate_grad_batches: give only one of them"
                )
            self.datamodule.batch_size, trainer.accumulate_grad_batches = share_batch(
                config.global_batch_size, self.datamodule.batch_size, trainer.world_size
            )
        return trainer

    def before_fit(self) -> None:
        batch, accumulate = self.datamodule.batch_size, self.trainer.accumulate_grad_batches
        ranks = self.trainer.world_size
        rank_zero_info(
            f"{batch * accumulate * ranks} images per step = {batch} at once x {accumulate} x {ranks} processes"
        )

    @property
    def _is_dry_run(self) -> bool:
        return self.subcommand == "fit" and self.config.fit.dry_run

    def _plan(self) -> None:
        """Print the plan; the trainer, which would look for the GPUs, is not made."""
        classes = self.parser.instantiate_classes(self.config).fit
        config = self.config.fit
        processes = count_processes(config.trainer)
        batch = (classes.data.batch_size, config.trainer.accumulate_grad_batches, processes)
        if config.global_batch_size is not None:
            batch = (*share_batch(config.global_batch_size, classes.data.batch_size, processes), processes)
        epochs = config.trainer.max_epochs
        if epochs is None:
            raise UsageError("--dry_run needs trainer.max_epochs")
        print(f"Plan of {config.trainer.default_root_dir}; nothing is trained")
        print(
            make_plan(classes.model, classes.data, epochs=epochs, batch=batch, precision=str(config.trainer.precision))
        )

    def _run_subcommand(self, subcommand: str) -> None:
        if self._is_dry_run:
            return
        try:
            super()._run_subcommand(subcommand)
        except DataError as error:
            # one from a data-loading process brings that process' traceback along, as text before the message
            raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from error
        except SIGTERMException as error:
            raise TrainingError(
                f"asked to end (SIGTERM) at step {self.trainer.global_step}; the same command with --resume goes on"
            ) from error
        except Exception as error:
            message = explain(error, self.datamodule.batch_size, self.trainer.default_root_dir)
            if message is None:
                raise
            raise TrainingError(message) from error

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir)
            print(f"Results in {folder}: {' '.join(sorted(file.name for file in folder.iterdir() if file.is_file()))}")


def in_short(message: str) -> str:
    """jsonargparse's message in one line, without the words about how it came to try several types."""
    if "Subtypes:" not in message:
        return message
    tried = r"(- )?(Does not validate against any|Subtypes:|Errors:|Expected a <class 'NoneType'>)"
    value = r"Given value type:|Given value: \w+\("  # of a class of jsonargparse's own
    lines = [line.strip() for line in message.splitlines()]
    kept = [line.removeprefix("- ") for line in lines if not re.match(f"{tried}|{value}", line)]
    return re.sub(r":(; )+", ": ", "; ".join(kept))


def count_processes(trainer: Any) -> int:
    """Processes of a run by its configuration: "auto" is what is here."""
    devices = trainer.devices
    if isinstance(devices, str):
        devices = -1 if devices == "auto" else [int(part) for part in devices.split(",")]
        if isinstance(devices, list) and len(devices) == 1:
            devices = devices[0]  # "4" is a number of GPUs, "0,2" are two of them
    if isinstance(devices, list):
        devices = len(devices)
    here = max(1, torch.cuda.device_count())
    return (here if devices == -1 else devices) * trainer.num_nodes


def run_cli(args: Sequence[str], kind: type[TrainingCLI] = TrainingCLI) -> TrainingCLI:
    """Run `fit`, `validate`, `test` or `predict` with these command-line arguments."""
    quieten()
    named = {word.split("=")[0].split(".")[0] for word in args[1:]}
    if not named & {"-c", "--config", "--model", "-h", "--help"}:
        raise UsageError(f"{args[0]} needs -c CONFIG: a file, or a shipped configuration (gsto --help lists them)")
    exact = {"allow_abbrev": False, "exit_on_error": False}  # one line about what is wrong, not 200 lines of usage
    return kind(
        TrainingTask,
        TrainingData,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,  # the task has its own
        load_from_checkpoint_support=False,  # the task's hyperparameters are what its constructor got
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "default_root_dir": "runs/train",
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "use_distributed_sampler": False,  # the loaders share the data among the processes by themselves
        },
        parser_kwargs={"prog": "gsto", **exact, **dict.fromkeys(TrainingCLI.subcommands(), exact)},
        args=args,
    )
