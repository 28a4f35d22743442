"""Runs in processes of their own: killed, asked to end, and sharing the work."""

import json
import signal

import pytest
import torch


def weights(checkpoint):
    return {name: tensor.double() for name, tensor in checkpoint["state_dict"].items()}


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


def test_two_processes_train_like_one_with_the_double_batch(toy, trace, checkpoint):
    """With a network that treats images one by one (GroupNorm, no dropout): BatchNorm is not synchronised on CPUs."""
    options = ["--model.norm=false", "--model.dropout=0", "--trainer.max_epochs=2", "--checkpoint_minutes=0.001"]
    pair = toy("pair", "--trainer.devices=2", "--data.batch_size=2", *options, own_process=True)
    assert pair.returncode == 0, pair.stderr[-2000:]
    assert toy("one", "--data.batch_size=4", *options) == 0
    ours, theirs = checkpoint("pair"), checkpoint("one")
    assert ours["global_step"] == theirs["global_step"] == 12
    for name, tensor in weights(theirs).items():
        assert torch.allclose(weights(ours)[name], tensor, rtol=1e-5, atol=1e-7), name
    images = [[line["names"] for line in trace("pair", rank).values() if "names" in line] for rank in range(2)]
    whole = [line["names"] for line in trace("one").values() if "names" in line]
    assert [[a, c, b, d] for (a, b), (c, d) in zip(*images, strict=True)] == whole
    scores = [[line["score"] for line in trace(name).values() if "score" in line] for name in ("pair", "one")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_a_loss_that_is_not_finite_ends_all_processes(toy, tmp_path):
    ended = toy("pair", "--trainer.devices=2", "--data.batch_size=2", "--model.nan_at=3", own_process=True)
    assert ended.returncode not in (0, -signal.SIGKILL)
    assert "the loss is nan at step 3" in ended.stderr and "Traceback" not in ended.stderr
    saved = torch.load(next((tmp_path / "pair").glob("bad_batch_step3_rank*.pt")), weights_only=True)
    assert json.dumps(list(saved["batch"][2])) and saved["batch"][0].shape == (2, 3, 6, 6)
