"""``gsto bench feed``: does a training run get its images as fast as it could use them?

    gsto bench feed -c camvid --data.root PATH --steps 50

Trains for so many steps with a configuration's own network, data, workers and augmentation, and writes nothing into its folder.
The work of every step is waited for, so that the time between steps is the wait for data and nothing else. Its first step, with
the start of the workers, does not count.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from ..configs import resolve_config_names
from ..errors import UsageError
from ..training.cli import TrainingCLI, run_cli
from . import report
from .options import at_least

STARVED = 0.05  # share of the time spent waiting from which on a run is called starved


class FeedMeter(Callback):
    """Times of the steps, and of the waits for their batches, in seconds; the first of both is left out."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.waits: list[float] = []
        self._end: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()
        if self._end is not None:
            self.waits.append(self._start - self._end)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        if self._end is not None:
            self.steps.append(time.perf_counter() - self._start)
        self._end = time.perf_counter()


class FeedCLI(TrainingCLI):
    """A training run of a few steps that leaves nothing behind."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--steps", type=int, default=50, help="optimizer steps to measure")

    def before_instantiate_classes(self) -> None:
        config = self.config.fit
        if config.resume or config.dry_run or config.ckpt_path is not None:
            raise UsageError("gsto bench feed begins anew: resume, dry_run and ckpt_path are not for it")
        at_least(3, steps=config.steps)
        config.trainer.max_steps, config.trainer.limit_val_batches = config.steps, 0
        config.trainer.enable_checkpointing, config.trainer.logger = False, False
        self.save_config_callback = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.meter = FeedMeter()
        return LightningCLI.instantiate_trainer(self, callbacks=[self.meter], **kwargs)

    def after_fit(self) -> None:
        pass


def run(argv: Sequence[str], description: str) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="gsto bench feed",
        usage="gsto bench feed -c CONFIG [--key value ...]",
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=report.FOLDER, help="folder of the results (default: %(default)s)")
    parser.epilog = "--steps N and everything else that gsto fit takes goes to the run"
    options, words = parser.parse_known_args(argv)
    cli = run_cli(["fit", *resolve_config_names(words)], kind=FeedCLI)
    if not cli.trainer.is_global_zero:
        return 0
    row = summary(cli)
    console = Console(width=140)
    columns = {
        "config": "configuration",
        "device": "device",
        "ms": "step ms",
        "spread": "middle half",
        "wait_ms": "wait ms",
    }
    columns |= {"waiting": "share waiting", "images_per_s": "images/s", "images_per_s_fed": "images/s, never waiting"}
    title = "A training run and its data"
    report.show(console, title, [row], {**columns, "workers": "workers"})
    note = verdict(row)
    console.print(note)
    files = report.write(options.out, "feed", title, [row], notes=[note])
    console.print(f"Results in {', '.join(map(str, files))}")
    return 0


def summary(cli: FeedCLI) -> report.Row:
    """What the run's steps and waits were."""
    steps, waits = cli.meter.steps, cli.meter.waits
    trainer, data = cli.trainer, cli.datamodule
    images = data.batch_size * trainer.world_size
    whole = sum(steps) + sum(waits)
    row: report.Row = {"config": str(trainer.default_root_dir), "device": trainer.strategy.root_device.type}
    row |= report.spread([1e3 * step for step in steps])
    row |= {"wait_ms": 1e3 * statistics.median(waits), "waiting": sum(waits) / whole, "workers": data.num_workers}
    return {**row, "images_per_s": images * len(steps) / whole, "images_per_s_fed": images * len(steps) / sum(steps)}


def verdict(row: report.Row) -> str:
    """A sentence for the user."""
    share, workers = float(row["waiting"]), int(row["workers"])
    if share <= STARVED:
        return f"Not starved: {share:.1%} of the time is waiting for data."
    if workers == 0:
        return f"{share:.1%} of the time is loading: data.num_workers is 0, so that a step waits while its images are loaded."
    need = max(workers + 1, math.ceil(workers * float(row["images_per_s_fed"]) / float(row["images_per_s"])))
    return (
        f"Starved: {share:.1%} of the time is waiting for data. With {workers} workers the run gets {row['images_per_s']:.1f} of "
        f"the {row['images_per_s_fed']:.1f} images/s that it could use: try data.num_workers {need}, if there are as many cores."
    )
