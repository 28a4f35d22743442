"""`gsto fit` and `gsto validate`: LightningCLI with a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from .errors import UsageError
from .quiet import quieten
from .segmentation import SegmentationData, SegmentationTask
from .segmentation.report import RunReport


class TrainingCLI(LightningCLI):
    """`fit` leaves everything in `trainer.default_root_dir`: config.yaml, best.ckpt (by `val/mIoU_ss`) and last.ckpt,
    metrics.csv, metrics.json, curves.png, predictions.png and TensorBoard's files."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        # Lightning's own method would warn about arguments given as a list
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the hyperparameters stored in the checkpoint override the configuration and the command
        # line, so that a run could not be resumed with another learning rate. Here what the user writes counts.
        pass

    def before_instantiate_classes(self) -> None:
        checkpoint = self.config[self.subcommand].ckpt_path
        if self.subcommand == "validate" and checkpoint is None:
            raise UsageError("validate needs --ckpt_path FILE: the checkpoint to evaluate")
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise UsageError(f"--ckpt_path {checkpoint}: no such file")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand].trainer
        folder = Path(config.default_root_dir)
        callbacks = [RichProgressBar(), *(config.callbacks or [])]
        logger = config.logger
        if self.subcommand == "fit":
            # Two callbacks: one with save_last would renew last.ckpt only when the best one changes
            last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
            best = ModelCheckpoint(folder, "best", "val/mIoU_ss", mode="max", enable_version_counter=False)
            callbacks += [RunReport(folder), last, best]
            if logger is None:
                logger = [CSVLogger(folder, name="", version=""), TensorBoardLogger(folder, "tensorboard", version="")]
        else:
            self.save_config_callback = None  # evaluating must not change the record of the training run
            logger = False
        return super().instantiate_trainer(callbacks=callbacks, logger=logger, **kwargs)

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            folder = self.trainer.default_root_dir
            print(f"Results in {folder}: best.ckpt last.ckpt metrics.json metrics.csv curves.png predictions.png")


def run_cli(args: Sequence[str]) -> None:
    """Run `fit` or `validate` with these command-line arguments."""
    quieten()
    exact = {"allow_abbrev": False}
    TrainingCLI(
        SegmentationTask,
        SegmentationData,
        subclass_mode_data=True,
        auto_configure_optimizers=False,  # the task has its own
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"default_root_dir": "runs/train", "num_sanity_val_steps": 0, "enable_model_summary": False},
        parser_kwargs={"prog": "gsto", **exact, "fit": exact, "validate": exact},
        args=args,
    )
