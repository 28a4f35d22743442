"""Which sample is drawn when: the order of a training run's samples and the seeds of their augmentation.

Both are functions of the run's seed, the epoch and the position alone. So they do not depend on the number of data-loading
workers, a run on N ranks with batch b sees the global batches of one rank with batch N * b, and a run can go on in mid-epoch.

    class MyDataset(Dataset):
        def __getitem__(self, item: int | Draw): ...   # an int: no augmentation; a Draw: numpy.random.default_rng(item.seed)

    loader = TrainLoader(dataset, batch_size=4, seed=run_seed(), num_workers=8)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler


class Draw(NamedTuple):
    """A sample to read, and the seed of everything that is random about reading it."""

    index: int
    seed: int


def run_seed() -> int:
    """The seed of the run, which `lightning.seed_everything` set for all ranks; 0 where it was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


class TrainSampler(Sampler[Draw]):
    """One rank's draws of an epoch: every rank's k-th draw is in the global batch's k-th stripe of `world_size` draws.

    Args:
        size: number of samples in the data set.
        seed: of the run.
        rank, world_size: this process, and the number of processes that share an epoch.
        multiple: an epoch is cut to a multiple of so many draws over all ranks (the rest of the order is dropped): the
            images of one optimizer step.

    Raises:
        ValueError: a rank outside 0 .. world_size - 1, a `multiple` that the ranks cannot share, or fewer samples than
            `multiple`.
    """

    def __init__(self, size: int, *, seed: int, rank: int = 0, world_size: int = 1, multiple: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. {world_size - 1} (world_size {world_size}), got {rank}")
        if multiple < 1 or (multiple > 1 and multiple % world_size):
            raise ValueError(f"multiple must be positive and a multiple of world_size {world_size}, got {multiple}")
        self.multiple = max(multiple, world_size)
        if size < self.multiple:
            raise ValueError(
                f"a step takes {self.multiple} samples over all processes, but the training set has {size}, and "
                "incomplete steps are dropped"
            )
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self.epoch = self.start = 0

    @property
    def length(self) -> int:
        """Draws of an epoch over all ranks."""
        return self.size - self.size % self.multiple

    def __len__(self) -> int:
        """Draws of a whole epoch of this rank."""
        return self.length // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch's beginning; the epoch that `set_position` chose stays where it is."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def set_position(self, epoch: int, start: int) -> None:
        """Go on in mid-epoch: the next iteration leaves out the epoch's first `start` draws of all ranks."""
        if not 0 <= start <= self.length or start % self.world_size:
            raise ValueError(f"start must be a multiple of {self.world_size} in 0 .. {self.length}, got {start}")
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[Draw]:
        # The raw words of Philox and a stable sort: unlike Generator.permutation they are the same in every NumPy
        random = np.random.Philox(np.random.SeedSequence((self.seed, self.epoch)))
        order = np.argsort(random.random_raw(self.size), kind="stable")
        seeds = random.random_raw(self.length) >> np.uint64(1)  # below 2**63, which fits an int64 as well
        for position in range(self.start + self.rank, self.length, self.world_size):
            yield Draw(int(order[position]), int(seeds[position]))


class ShardSampler(Sampler[int]):
    """Every `world_size`-th index from `rank` on: all ranks together read each sample once, none twice (for evaluation)."""

    def __init__(self, size: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, size, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class TrainLoader(DataLoader):
    """Batches of a training run. Its state is a position in the epoch, by which a checkpoint goes on in mid-epoch.

    Args:
        dataset: takes a `Draw` as its index.
        batch_size: samples per rank and batch.
        seed, rank, world_size: see `TrainSampler`.
        accumulate: batches per optimizer step; an epoch is a whole number of steps.
        **options: of `torch.utils.data.DataLoader`.

    Raises:
        ValueError: the data set has fewer samples than one step takes, or `load_state_dict` gets a position in mid-epoch
            of a run with batches or a training set of another size.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        **options: Any,
    ) -> None:
        self.draws = TrainSampler(
            len(dataset), seed=seed, rank=rank, world_size=world_size, multiple=batch_size * world_size * accumulate
        )
        self.global_size = batch_size * world_size
        self.epoch, self.taken = 0, 0  # of the batches that the iterator gave out
        super().__init__(dataset, batch_size, sampler=self.draws, drop_last=True, **options)

    def __iter__(self) -> Iterator[Any]:
        self.epoch, self.taken = self.draws.epoch, self.draws.start // self.global_size
        for batch in super().__iter__():
            self.taken += 1  # counted here: the sampler is ahead by what the workers prefetch
            yield batch

    def state_dict(self) -> dict[str, int]:
        steps = {"samples": self.draws.size, "global_size": self.global_size, "batches": len(self)}
        return {"seed": self.draws.seed, "epoch": self.epoch, "taken": self.taken, **steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        epoch, taken = state["epoch"], state["taken"]
        if taken == state["batches"]:
            epoch, taken = epoch + 1, 0
        for name, meaning in (
            ("global_size", "batch_size x number of processes"),
            ("samples", "size of the training set"),
        ):
            here = self.state_dict()[name]
            if taken and state[name] != here:
                raise ValueError(
                    f"the checkpoint was written in mid-epoch, with {name} {state[name]} ({meaning}); it cannot go on with "
                    f"{here}. At the end of an epoch these may change"
                )
        self.draws.seed = state["seed"]  # a run goes on with the order that it began with
        self.draws.set_position(epoch, taken * self.global_size)
        self.epoch, self.taken = epoch, taken
