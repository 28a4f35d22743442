import os

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from gsto_benchmarks.sampling import Draw, ShardSampler, TrainLoader, TrainSampler, run_seed


class Numbers(Dataset):
    """Item (index, a random number drawn from the draw's seed)."""

    def __len__(self):
        return 23

    def __getitem__(self, draw):
        return draw.index, np.random.default_rng(draw.seed).random()


def loader(rank=0, world_size=1, batch_size=4, accumulate=1, **options):
    return TrainLoader(
        Numbers(), batch_size, seed=5, rank=rank, world_size=world_size, accumulate=accumulate, **options
    )


def batches(loader, epoch=0):
    loader.draws.set_epoch(epoch)
    return [torch.stack([index.double(), number]) for index, number in loader]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_epoch_draws_every_sample_once_with_its_own_seed():
    sampler = TrainSampler(1000, seed=0)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        draws = list(sampler)
        assert len(sampler) == 1000 and all(isinstance(draw, Draw) for draw in draws)
        assert sorted(draw.index for draw in draws) == list(range(1000))
        assert len({draw.seed for draw in draws}) == 1000 and all(0 <= draw.seed < 2**63 for draw in draws)
        epochs.append(draws)
    assert epochs[0] != epochs[1] and not {d.seed for d in epochs[0]} & {d.seed for d in epochs[1]}
    assert [d.index for d in epochs[0]] != list(range(1000))
    assert list(TrainSampler(1000, seed=1)) != epochs[0]
    assert list(TrainSampler(1000, seed=0)) == epochs[0]


def test_order_is_the_same_in_every_release():
    """The order of a run must outlive updates, or an old checkpoint would go on with another one."""
    assert [draw.index for draw in TrainSampler(8, seed=3)] == [0, 1, 2, 7, 5, 6, 4, 3]
    assert next(iter(TrainSampler(8, seed=3))).seed == 8598787869326728032


def test_ranks_share_the_global_batches_of_one_rank():
    single = batches(loader(batch_size=8), epoch=3)
    ranks = [batches(loader(rank, 2, 4), epoch=3) for rank in range(2)]
    assert len(single) == 2 and all(len(rank) == 2 for rank in ranks)
    for whole, *parts in zip(single, *ranks, strict=True):
        assert torch.equal(whole, torch.stack(parts, dim=-1).flatten(1))


def test_accumulated_batches_are_the_global_batch():
    single, parts = batches(loader(batch_size=8)), batches(loader(batch_size=4, accumulate=2))
    assert len(parts) == 4  # whole steps only: 16 of 23 samples
    assert equal(single, [torch.cat(pair, dim=1) for pair in zip(parts[::2], parts[1::2], strict=True)])


@pytest.mark.parametrize("workers", [0, 2])
def test_position_survives_a_restart(workers):
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    whole = [batches(loader(), epoch) for epoch in (0, 1, 2)]
    first = loader(**options)
    batches(first, 0)
    first.draws.set_epoch(1)
    iterator = iter(first)
    next(iterator), next(iterator)
    state = first.state_dict()
    second = loader(**options)
    second.load_state_dict(state)
    assert equal([torch.stack([i.double(), n]) for i, n in second], whole[1][2:])
    assert second.state_dict()["taken"] == len(whole[1]) == len(second)
    assert equal(batches(second, 2), whole[2])


def test_a_finished_epoch_goes_on_with_the_next():
    first, second = loader(), loader()
    expected = batches(loader(), 1)
    batches(first, 0)
    first.draws.set_epoch(1)  # the next epoch was announced, but not begun
    second.load_state_dict(first.state_dict())
    assert second.draws.epoch == 1 and second.state_dict()["taken"] == 0
    assert equal(batches(second, 1), expected)


def test_the_order_of_the_checkpoint_counts():
    state = {**loader().state_dict(), "seed": 6}
    other = loader()
    other.load_state_dict(state)
    assert other.draws.seed == 6


def test_mid_epoch_with_other_batches_is_an_error():
    first = loader()
    next(iter(first))
    with pytest.raises(ValueError, match=r"mid-epoch, with global_size 4 .* cannot go on with 8"):
        loader(world_size=2).load_state_dict(first.state_dict())
    batches(first)
    loader(world_size=2).load_state_dict(first.state_dict())  # at the end of an epoch everything may change


def test_shards_cover_the_set_once():
    read = [index for rank in range(3) for index in ShardSampler(11, rank, 3)]
    assert sorted(read) == list(range(11)) and len(ShardSampler(11, 2, 3)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 10, "rank": 2, "world_size": 2}, r"rank must be in 0 \.\. 1 .*got 2"),
        (
            {"size": 10, "world_size": 2, "multiple": 3},
            "multiple must be positive and a multiple of world_size 2, got 3",
        ),
        ({"size": 10, "multiple": 12}, "a step takes 12 samples .* the training set has 10"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TrainSampler(seed=0, **options)


def test_run_seed(monkeypatch):
    monkeypatch.delitem(os.environ, "PL_GLOBAL_SEED", raising=False)
    assert run_seed() == 0
    monkeypatch.setitem(os.environ, "PL_GLOBAL_SEED", "7")
    assert run_seed() == 7
