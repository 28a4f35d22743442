"""Nothing is lost: interrupted and resumed runs end exactly like the uninterrupted one."""

import pytest
import torch
from toy_task import Crash


def differences(a, b, path="checkpoint"):
    """Where two checkpoints differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [line for key in a for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} items"]
        pairs = enumerate(zip(a, b, strict=True))
        return [line for index, (x, y) in pairs for line in differences(x, y, f"{path}[{index}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [f"{path}: tensors"]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]


def assert_equal_runs(one, other):
    # the folders' names, and the rehearsed end, differ by the test's making; current_score is what an evaluation left behind
    unlike = ("path", "models", "current_score")
    for run in (one, other):
        run["hyper_parameters"] = {k: v for k, v in run["hyper_parameters"].items() if k != "end_at"}
        for key, state in list(run["callbacks"].items()):
            run["callbacks"][key] = {k: v for k, v in state.items() if not any(word in k for word in unlike)}
    assert differences(one, other) == []


VARIANTS = {
    "sgd": [],
    "adamw, workers": ["--model.optimizer=adamw", "--data.num_workers=2"],
    "average of the weights": ["--ema_decay=0.9"],
    "accumulated": ["--global_batch_size=4", "--data.batch_size=2"],
    "evaluations in mid-epoch": ["--trainer.val_check_interval=3"],
    "evaluations every other epoch": ["--trainer.check_val_every_n_epoch=2"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_run_equals_the_uninterrupted_one(toy, trace, checkpoint, variant):
    """6 steps in each of 3 epochs, ended twice: in mid-epoch, and in the first step of an epoch."""
    options = VARIANTS[variant]
    assert toy("whole", *options) == 0
    for end_at in (4, 12):
        with pytest.raises(Crash):
            toy("parts", *options, "--resume", f"--model.end_at={end_at}")
    assert toy("parts", *options, "--resume") == 0
    assert_equal_runs(checkpoint("whole"), checkpoint("parts"))
    assert trace("whole") == trace("parts")
    assert checkpoint("whole")["global_step"] == 18


@pytest.mark.parametrize("end_at", range(1, 13))
def test_every_place_to_be_ended_at(toy, trace, checkpoint, end_at):
    options = ["--checkpoint_steps=1", "--trainer.max_epochs=2"]
    assert toy("whole", *options) == 0
    if end_at < 12:
        with pytest.raises(Crash):
            toy("parts", *options, f"--model.end_at={end_at}")
    else:
        assert toy("parts", *options) == 0
    assert toy("parts", *options, "--resume") == 0
    assert_equal_runs(checkpoint("whole"), checkpoint("parts"))
    assert trace("whole") == trace("parts")
