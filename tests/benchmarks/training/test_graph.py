"""CUDA graphs: what can be tested without a GPU, by a stand-in that replays by calling; a comparison for a machine with one."""

from types import SimpleNamespace

import pytest
import torch
from toy_task import Crash, ToyTask

from gsto_benchmarks.errors import TrainingError, UsageError
from gsto_benchmarks.training import graph, task
from gsto_benchmarks.training.graph import GraphedStep, check_cuda_graph, prepare_optimizer
from gsto_benchmarks.training.optimization import OPTIMIZERS, make_optimizer


def batch(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 6, 6, generator=generator), torch.arange(size) % 2, ["x"] * size


@pytest.fixture
def captures(monkeypatch):
    """A stand-in for the capture: like the real one it runs the step a few times before, and hands over a replay of it."""
    found = []

    def capture(step):
        for _ in range(3):
            step()
        found.append(step)
        return step

    monkeypatch.setattr(graph, "captured", capture)
    monkeypatch.setattr(task, "check_cuda_graph", lambda trainer, compiled: None)
    return found


def make(name):
    torch.manual_seed(0)
    toy = ToyTask(2, dropout=0.0).train()
    optimizer = make_optimizer(name, toy.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
    prepare_optimizer(optimizer, graphed=True, fused=True, device=torch.device("cpu"))
    return toy, optimizer


@pytest.mark.parametrize("clip, clip_by", [(None, "norm"), (0.1, "norm"), (0.01, "value")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_capture_leaves_no_trace(captures, name, clip, clip_by):
    """Neither in weights, statistics and gradients, nor in the optimizer, be it new or in the middle of a run."""
    (ours, our_optimizer), (theirs, their_optimizer) = make(name), make(name)
    step = GraphedStep(ours, our_optimizer, clip, clip_by)
    for seed in range(5):
        if seed == 3:
            step = GraphedStep(ours, our_optimizer, clip, clip_by)
        rate = 0.1 / (seed + 1)
        for optimizer in (our_optimizer, their_optimizer):
            optimizer.param_groups[0]["lr"].fill_(rate)
        images, labels, names = batch(4, seed)
        loss = step((images, labels, names))
        their_optimizer.zero_grad()
        expected = theirs.training_loss((images, labels, names))
        expected.backward()
        if clip is not None:
            by = {"norm": torch.nn.utils.clip_grad_norm_, "value": torch.nn.utils.clip_grad_value_}[clip_by]
            by(theirs.parameters(), clip)
        their_optimizer.step()
        assert torch.equal(loss, expected) and not loss.requires_grad
    assert len(captures) == 2
    for (key, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    for one, other in zip(our_optimizer.state.values(), their_optimizer.state.values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_batch_is_copied_to_the_graphs_place(captures):
    toy, optimizer = make("sgd")
    step = GraphedStep(toy, optimizer)
    images, labels, names = batch(4, 0)
    kept = images.clone()
    first = step((images, labels, names))
    second = step(batch(4, 1))
    assert torch.equal(images, kept) and not torch.equal(first, second), "an earlier loss stays what it was"


def test_batch_of_another_shape(captures):
    toy, optimizer = make("sgd")
    step = GraphedStep(toy, optimizer)
    step(batch(4, 0))
    with pytest.raises(
        TrainingError, match=r"batches of one shape, got \[\(3, 3, 6, 6\), \(3,\)\] after \[\(4, 3, 6, 6\)"
    ):
        step(batch(3, 0))


def test_autocast_keeps_no_weights_from_before_the_capture(captures):
    """Cast once and kept, they would be what every replay sees."""
    toy, optimizer = make("sgd")
    step = GraphedStep(toy, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        toy.training_loss(batch(4, 0))  # leaves bfloat16 weights in autocast's cache
        losses = [float(step(batch(4, 0))) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


VARIANTS = {
    "sgd": [],
    "adamw": ["--model.optimizer=adamw", "--model.lr=0.01"],
    "clipped": ["--trainer.gradient_clip_val=0.05"],
    "clipped by value": ["--trainer.gradient_clip_val=0.01", "--trainer.gradient_clip_algorithm=value"],
    "mixed precision, clipped": ["--trainer.precision=bf16-mixed", "--trainer.gradient_clip_val=0.05"],
    "average of the weights": ["--ema_decay=0.9"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_replayed_by_the_stand_in(toy, trace, checkpoint, compare_runs, captures, variant):
    """It equals the plain run but for the rate's float32, and the interrupted and resumed one exactly."""
    options = ["--data.train_size=24", "--trainer.max_epochs=2", *VARIANTS[variant]]
    graphed = [*options, "--model.cuda_graph=true"]
    assert toy("plain", *options) == 0 and not captures
    assert toy("whole", *graphed) == 0 and len(captures) == 1
    losses = [[line["loss"] for line in trace(run).values() if "loss" in line] for run in ("plain", "whole")]
    assert len(losses[0]) == 12 and losses[1] == pytest.approx(losses[0], rel=1e-2 if "bf16" in str(options) else 1e-4)
    with pytest.raises(Crash):
        toy("parts", *graphed, "--model.end_at=5")
    assert toy("parts", *graphed, "--resume") == 0
    compare_runs(checkpoint("whole"), checkpoint("parts"))
    assert checkpoint("whole")["global_step"] == 12


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_goes_on_with_a_graph_or_without(toy, trace, captures, optimizer):
    options = ["--data.train_size=24", "--trainer.max_epochs=2", f"--model.optimizer={optimizer}", "--model.lr=0.01"]
    options.append("--trainer.gradient_clip_val=0.1")  # without a graph the optimizer is not a fused one
    assert toy("plain", *options) == 0
    expected = [line["loss"] for line in trace("plain").values() if "loss" in line]
    for first, second in (("true", "false"), ("false", "true")):
        with pytest.raises(Crash):
            toy(first, *options, f"--model.cuda_graph={first}", "--model.end_at=6")
        assert toy(first, *options, f"--model.cuda_graph={second}", "--resume") == 0
        losses = [line["loss"] for line in trace(first).values() if "loss" in line]
        assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu"}, "needs an NVIDIA GPU, but this run is on cpu"),
        ({"compiled": True}, "exclude each other"),
        ({"world_size": 2}, "is for one process, but this run has 2"),
        ({"accumulate_grad_batches": 3}, "accumulated over 3 batches: set data.batch_size"),
        ({"precision": "16-mixed"}, "set trainer.precision to bf16-mixed"),
    ],
)
def test_runs_that_cannot_use_it(changes, message):
    values = {"device": "cuda", "compiled": False, "world_size": 1, "accumulate_grad_batches": 1} | changes
    values = {"precision": "bf16-mixed"} | values
    strategy = SimpleNamespace(root_device=torch.device(values.pop("device")))
    compiled = values.pop("compiled")
    with pytest.raises(UsageError, match=message):
        check_cuda_graph(SimpleNamespace(strategy=strategy, **values), compiled)


def test_on_a_cpu_the_command_says_so(toy, capsys):
    assert toy("run", "--model.cuda_graph=true") == 2
    assert "model.cuda_graph needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_graphed_run_equals_the_plain_one(toy, trace, variant):
    options = ["--trainer.accelerator=gpu", "--trainer.max_epochs=2", "--model.dropout=0", *VARIANTS[variant]]
    assert toy("plain", *options) == 0
    assert toy("graphed", *options, "--model.cuda_graph=true") == 0
    losses = [[line["loss"] for line in trace(run).values() if "loss" in line] for run in ("plain", "graphed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if "bf16" in str(options) else 1e-4)
