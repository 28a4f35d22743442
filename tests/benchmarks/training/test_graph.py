"""CUDA graphs: what can be tested without a GPU, and the comparison for a machine that has one."""

from types import SimpleNamespace

import pytest
import torch
from toy_task import ToyTask

from gsto_benchmarks.errors import TrainingError, UsageError
from gsto_benchmarks.training.graph import GraphedLoss, check_cuda_graph


def batch(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 6, 6, generator=generator), torch.arange(size) % 2, ["x"] * size


@pytest.fixture
def captured(monkeypatch):
    """A stand-in for the capture: like the real one it runs the callable a few times and keeps its arguments."""
    calls = []

    def capture(module, arguments, allow_unused_input):
        for _ in range(3):
            module(*arguments).backward()
        module.zero_grad()
        calls.append(arguments)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    return calls


def test_capture_leaves_no_trace(captured):
    torch.manual_seed(0)
    task, twin = ToyTask(2, dropout=0.0).train(), ToyTask(2, dropout=0.0).train()
    twin.load_state_dict(task.state_dict())
    loss = GraphedLoss(task)
    for seed in range(3):
        images, labels, names = batch(4, seed)
        ours, theirs = loss((images, labels, names)), twin.training_loss((images, labels, names))
        assert torch.equal(ours, theirs)
        ours.backward()
        theirs.backward()
    assert len(captured) == 1 and captured[0][0].data_ptr() != images.data_ptr()
    for (name, value), other in zip(task.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    for one, other in zip(task.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_batch_of_another_shape(captured):
    loss = GraphedLoss(ToyTask(2))
    loss(batch(4, 0))
    with pytest.raises(
        TrainingError, match=r"batches of one shape, got \[\(3, 3, 6, 6\), \(3,\)\] after \[\(4, 3, 6, 6\)"
    ):
        loss(batch(3, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu"}, "needs an NVIDIA GPU, but this run is on cpu"),
        ({"compiled": True}, "exclude each other"),
        ({"world_size": 2}, "is for one process, but this run has 2"),
        ({"accumulate_grad_batches": 3}, "accumulated over 3 batches: set data.batch_size"),
    ],
)
def test_runs_that_cannot_use_it(changes, message):
    values = {"device": "cuda", "compiled": False, "world_size": 1, "accumulate_grad_batches": 1} | changes
    strategy = SimpleNamespace(root_device=torch.device(values.pop("device")))
    compiled = values.pop("compiled")
    with pytest.raises(UsageError, match=message):
        check_cuda_graph(SimpleNamespace(strategy=strategy, **values), compiled)


def test_on_a_cpu_the_command_says_so(toy, capsys):
    assert toy("run", "--model.cuda_graph=true") == 2
    assert "model.cuda_graph needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_graphed_run_equals_the_plain_one(toy, trace):
    options = ["--trainer.accelerator=gpu", "--trainer.max_epochs=2", "--model.dropout=0"]
    assert toy("plain", *options) == 0
    assert toy("graphed", *options, "--model.cuda_graph=true") == 0
    losses = [[line["loss"] for line in trace(run).values() if "loss" in line] for run in ("plain", "graphed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
