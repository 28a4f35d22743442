"""Launch configurations of the Triton kernels and their tuning cache: pure functions, tested without a GPU and without triton."""

import json
import multiprocessing
import warnings
from itertools import product

import pytest
import torch

from gsto_ops.tables import warn_once
from gsto_ops.triton import configs, tuning
from gsto_ops.triton.configs import Problem, Target

H200 = Target("sm_90", 132, "NVIDIA H200")
KERNELS = sorted({kernel for kernel, _ in configs.TABLE["sm_90"]})
SIZES = [(8, 512, 1024), (8, 16, 32), (1, 129, 257), (3, 1, 5), (0, 6, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(
    kernel="project", dtype=torch.bfloat16, last=True, channels=96, out_channels=48, images=8, height=64, width=128
):
    return Problem(kernel, dtype, last, channels, out_channels, images, height, width, "ieee")


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_choice_is_legal(kernel):
    channels = (1, 18, 36, 48, 130, 384, 520, 2048)
    for dtype, last, c, o, size in product(DTYPES, (False, True), channels, (1, 18, 512), SIZES):
        for target in (H200, Target("sm_80", 108, "A100"), Target("gfx942", 304, "other"), Target("cpu", 1, "cpu")):
            p = problem(kernel, dtype, last, c, o, *size)
            for config in configs.candidates(p, target):
                assert all(n & (n - 1) == 0 for n in config[:5]), f"{p}: {config} is not made of powers of two"
                assert 1 <= config.num_warps <= 8 and config.num_stages >= 1
                if kernel in configs._PRODUCTS:  # what the matrix units take at least
                    assert config.height * config.width >= 16 and config.channels >= 16
                    assert config.out_channels >= 16
                if kernel.startswith("gate_pool") and c <= 512:
                    assert config.channels >= c, "a tile holds all channels of its pixels"
                assert config.height * config.width * config.channels <= 1 << 15


def test_tiles_shrink_until_the_gpu_is_busy():
    large = configs.choose(problem(images=8, height=512, width=1024), H200)
    small = configs.choose(problem(images=1, height=16, width=32), H200)
    assert large.width == configs.TABLE["sm_90"]["project", 2].pixels
    assert small.width == 16 and small.num_warps < large.num_warps
    busy = problem(images=8, height=512, width=1024)
    assert configs.programs(busy, configs.choose(busy, H200)) >= configs.WAVES * H200.multiprocessors


def test_a_tight_problem_has_half_a_tile():
    full, tight = (
        configs.choose(problem(out_channels=128, height=512, width=1024)._replace(tight=t), H200) for t in (False, True)
    )
    assert tight.width * 2 == full.width and tight.out_channels == full.out_channels


def test_tile_shapes_follow_the_layout():
    square = configs.choose(problem("resample", images=8, height=512, width=1024), H200)
    rows = configs.choose(problem("resample", last=False, images=8, height=512, width=1024), H200)
    assert square.height > 1 and square.width == 8
    assert rows.width >= 32


def test_splits_bound_the_partial_sums():
    assert configs.splits(H200, 1, 1 << 16, 64, 64 * 65) == 2 * configs.WAVES * 132
    assert configs.splits(H200, 1, 4, 64, 64 * 65) == 1  # 256 pixels each at least
    row = 4096 * 4097
    assert configs.splits(H200, 4096, 1 << 16, 64, row) == 1
    assert configs.splits(H200, 8, 1 << 16, 64, 2048 * 2049) * 4 * 2048 * 2049 <= configs.MAX_SUMS
    assert configs.splits(H200, 0, 0, 64, 10) == 1


def test_an_unknown_architecture_has_a_choice():
    assert configs.choose(problem(), Target("sm_120", 100, "x")) == configs.choose(problem(), Target("sm_80", 100, "x"))


def test_run_uses_the_choice_without_autotuning(monkeypatch):
    monkeypatch.delenv("GSTO_AUTOTUNE", raising=False)
    seen = []
    configs.run(problem(), torch.device("cpu"), seen.append)
    assert seen == [configs.choose(problem(), configs.target_of(torch.device("cpu")))]


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.TABLE.forget()
    warn_once.cache_clear()
    return tmp_path / "gsto_ops" / "triton.json"


def test_the_fastest_candidate_is_remembered(cache):
    found = configs.candidates(problem(), H200)
    assert len(found) > 3 and found[0] == configs.choose(problem(), H200)
    ran = []

    def measure(function):
        function()
        return abs(ran[-1].num_warps - 8)  # pretends that 8 warps are fastest

    def fastest():
        return tuning.fastest("a problem", found, ran.append, measure)

    assert fastest()[4] == 8 and ran == found
    assert fastest()[4] == 8 and ran == found, "the second call timed again"
    tuning.TABLE.forget()  # another process
    assert fastest()[4] == 8 and ran == found, "the cache file was not read"
    assert json.loads(cache.read_text()) == {"a problem": list(fastest())}


@pytest.mark.parametrize("content", ["{ half of it", "[1, 2]", '{"key": [1, 2]}', '{"key": [1, 1, 1, 1, 0, "x"]}'])
def test_a_damaged_cache_is_ignored_once_told(cache, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    with pytest.warns(UserWarning, match="is ignored"):
        assert tuning.TABLE.read() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.TABLE.read() == {}
    tuning.TABLE.write("key", [1, 2, 4, 8, 4, 3])
    assert tuning.TABLE.read() == {"key": [1, 2, 4, 8, 4, 3]}


def test_a_cache_that_cannot_be_written_does_not_stop_the_call(cache):
    cache.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        tuning.TABLE.write("key", [1, 2, 4, 8, 4, 3])


def _write_many(writer):
    for i in range(20):
        tuning.TABLE.write(f"{writer}-{i}", [1, 1, 1, 1, 1, writer + 1])


def test_concurrent_writers_lose_nothing(cache):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(n,)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert tuning.TABLE.read().keys() == {f"{n}-{i}" for n in range(3) for i in range(20)}
    assert {path.name for path in cache.parent.iterdir()} == {"triton.json", "triton.lock"}


def test_keys_tell_problems_apart():
    problems = [
        problem(),
        problem(kernel="resample"),
        problem(dtype=torch.float16),
        problem(last=False),
        problem(channels=97),
        problem(out_channels=49),
        problem(images=9),
        problem(height=65),
        problem()._replace(precision="tf32"),
        problem()._replace(tight=True),
    ]
    keys = {configs.tuning_key(p, H200) for p in problems} | {
        configs.tuning_key(problem(), H200._replace(name="other"))
    }
    assert len(keys) == 11
    assert configs.tuning_key(problem(width=100), H200) == configs.tuning_key(problem(width=128), H200)
