import os
from contextlib import contextmanager

import pytest
import torch

from gsto_benchmarks.errors import TrainingError
from gsto_benchmarks.training.checkpoints import AtomicCheckpointIO, checkpoint_fault, newest_checkpoint


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    else:
        place = content.index(torch.full((50,), 7.0).numpy().tobytes())
        content[place + 60] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit"])
def test_damage_is_found(tmp_path, how):
    file = tmp_path / "last.ckpt"
    torch.save({"weights": torch.full((50,), 7.0)}, file)
    assert checkpoint_fault(file) is None
    damage(file, how)
    assert checkpoint_fault(file)


def test_newest_whole_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for name in ("previous.ckpt", "last.ckpt", "next.ckpt"):  # from the oldest
        torch.save({"weights": torch.full((50,), 7.0)}, tmp_path / name)
        assert newest_checkpoint(tmp_path) == tmp_path / name
    damage(tmp_path / "next.ckpt", "truncated")
    with pytest.warns(UserWarning, match=r"next.ckpt is damaged .*the one before is used: .*last.ckpt"):
        assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    for name in ("previous.ckpt", "last.ckpt"):
        damage(tmp_path / name, "one bit")
    with pytest.raises(TrainingError, match=r"previous.ckpt is damaged .* no checkpoint to go on from"):
        newest_checkpoint(tmp_path)


def test_damaged_newest_checkpoint_costs_one_interval(toy, trace, checkpoint, compare_runs, tmp_path, capsys):
    assert toy("whole") == 0
    assert toy("parts", "--trainer.max_epochs=2") == 0
    last = tmp_path / "parts" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="last.ckpt is damaged"):
        assert toy("parts", "--resume") == 0
    # another plan of the first two epochs would have other learning rates, so only the place in the data is compared
    whole, parts = ([line.get("names") for line in trace(name).values()] for name in ("whole", "parts"))
    assert whole == parts and checkpoint("parts")["global_step"] == 18


@contextmanager
def full_disk():
    """Files cannot grow beyond 4 KiB, which is how this process sees a disk that is full.

    Not a fixture: pytest writes a test's result before it ends them, and its own output may be a file.
    """
    resource = pytest.importorskip("resource", reason="limits of a process are Unix")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [2_000, 2_000_000])
def test_full_disk_leaves_the_old_file(tmp_path, size):
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, file)
    before = file.read_bytes()
    with full_disk(), pytest.warns(UserWarning, match=r"last.ckpt could not be written .*File too large.* MiB free"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(size)}, file)
    assert os.listdir(tmp_path) == ["last.ckpt"] and file.read_bytes() == before


def test_no_space_left_on_device(tmp_path):
    (tmp_path / "last.ckpt.partial").symlink_to("/dev/full")  # the file that is written first
    with pytest.warns(UserWarning, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(1000)}, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == []


def test_run_on_a_full_disk_goes_on_and_fails_at_its_end(toy, tmp_path, monkeypatch, capsys, checkpoint):
    """The disk is full from step 6 on."""
    save = AtomicCheckpointIO.save_checkpoint

    def save_until_full(self, state, path, storage_options=None):
        if state["global_step"] > 5:
            os.symlink("/dev/full", f"{path}.partial")
        save(self, state, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save_until_full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert toy("run") == 1
    assert "could not be written" in capsys.readouterr().err
    assert checkpoint("run")["global_step"] == 4
    monkeypatch.undo()
    assert toy("run", "--resume") == 0
    assert checkpoint("run")["global_step"] == 18


def test_folder_of_a_run_is_not_overwritten(toy, tmp_path, capsys):
    assert toy("run", "--trainer.max_epochs=1") == 0
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    assert toy("run") == 2
    assert "holds the checkpoints of a run: continue it with --resume" in capsys.readouterr().err
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before
    assert toy("run", "--resume", "--ckpt_path=x") == 2


def test_damaged_file_of_the_command_line(toy, tmp_path, capsys):
    (tmp_path / "bad.ckpt").write_bytes(b"PK and nothing else")
    assert toy("run", f"--ckpt_path={tmp_path / 'bad.ckpt'}") == 2
    assert "bad.ckpt: the file is damaged" in capsys.readouterr().err
