"""Nothing is lost: interrupted and resumed runs end exactly like the uninterrupted one."""

import pytest
from toy_task import Crash

VARIANTS = {
    "sgd": [],
    "adamw, workers": ["--model.optimizer=adamw", "--data.num_workers=2"],
    "average of the weights": ["--ema_decay=0.9"],
    "mixed precision": ["--trainer.precision=bf16-mixed"],
    "accumulated": ["--global_batch_size=4", "--data.batch_size=2"],
    "evaluations in mid-epoch": ["--trainer.val_check_interval=3"],
    "evaluations every other epoch": ["--trainer.check_val_every_n_epoch=2"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_run_equals_the_uninterrupted_one(toy, trace, checkpoint, compare_runs, variant):
    """6 steps in each of 3 epochs, ended twice: in mid-epoch, and in the first step of an epoch."""
    options = VARIANTS[variant]
    assert toy("whole", *options) == 0
    for end_at in (4, 12):
        with pytest.raises(Crash):
            toy("parts", *options, "--resume", f"--model.end_at={end_at}")
    assert toy("parts", *options, "--resume") == 0
    compare_runs(checkpoint("whole"), checkpoint("parts"))
    assert trace("whole") == trace("parts")
    assert checkpoint("whole")["global_step"] == 18


def test_every_place_to_be_ended_at(toy, trace, checkpoint, compare_runs):
    """With a checkpoint after each of 2 x 4 steps; the last place is behind the end of the run."""
    options = ["--checkpoint_steps=1", "--trainer.max_epochs=2", "--data.train_size=16"]
    assert toy("whole", *options) == 0
    for end_at in range(1, 9):
        folder = f"ended at {end_at}"
        if end_at < 8:
            with pytest.raises(Crash):
                toy(folder, *options, f"--model.end_at={end_at}")
        else:
            assert toy(folder, *options) == 0
        assert toy(folder, *options, "--resume") == 0
        compare_runs(checkpoint("whole"), checkpoint(folder))
        assert trace("whole") == trace(folder), folder
