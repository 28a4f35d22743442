"""Runs in processes of their own: killed, asked to end, and sharing the work."""

import signal

import pytest
import torch


@pytest.mark.parametrize("end_by", ["SIGKILL", "SIGTERM"])
def test_run_ended_from_outside_goes_on(toy, trace, checkpoint, compare_runs, end_by):
    """kill -9 in mid-epoch loses the steps since the last checkpoint; SIGTERM, which announces the end, none."""
    ended = toy("parts", "--model.end_at=9", f"--model.end_by={end_by}", "--checkpoint_steps=4", own_process=True)
    assert ended.returncode != 0
    if end_by == "SIGKILL":
        assert ended.returncode == -signal.SIGKILL
    assert checkpoint("parts")["global_step"] == {"SIGKILL": 8, "SIGTERM": 10}[end_by]
    assert toy("parts", "--resume") == 0
    assert toy("whole") == 0
    compare_runs(checkpoint("whole"), checkpoint("parts"))
    assert trace("whole") == trace("parts")


def test_two_processes_train_like_one_with_the_double_batch(toy, trace, checkpoint, tmp_path):
    """Ended in mid-epoch, by a loss that is not finite, and resumed.

    With a network that treats images one by one (GroupNorm, no dropout): BatchNorm is not synchronised on CPUs.
    """
    options = ["--model.norm=false", "--model.dropout=0", "--trainer.max_epochs=2", "--checkpoint_minutes=0.001"]
    pair = ["--trainer.devices=2", "--data.batch_size=2", *options]
    ended = toy("pair", *pair, "--model.nan_at=9", own_process=True)
    assert ended.returncode not in (0, -signal.SIGKILL)
    assert "the loss is nan at step 9" in ended.stderr and "Traceback" not in ended.stderr
    saved = torch.load(next((tmp_path / "pair").glob("bad_batch_step9_rank*.pt")), weights_only=True)
    assert saved["batch"][0].shape == (2, 3, 6, 6) and len(saved["batch"][2]) == 2
    assert checkpoint("pair")["global_step"] == 8
    resumed = toy("pair", *pair, "--resume", own_process=True)
    assert resumed.returncode == 0, resumed.stderr[-2000:]

    assert toy("one", "--data.batch_size=4", *options) == 0
    ours, theirs = checkpoint("pair"), checkpoint("one")
    assert ours["global_step"] == theirs["global_step"] == 12
    for name, tensor in theirs["state_dict"].items():
        assert torch.allclose(ours["state_dict"][name], tensor, rtol=1e-5, atol=1e-7), name
    images = [[line["names"] for line in trace("pair", rank).values() if "names" in line] for rank in range(2)]
    whole = [line["names"] for line in trace("one").values() if "names" in line]
    assert [[a, c, b, d] for (a, b), (c, d) in zip(*images, strict=True)] == whole
    scores = [[line["score"] for line in trace(name).values() if "score" in line] for name in ("pair", "one")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
