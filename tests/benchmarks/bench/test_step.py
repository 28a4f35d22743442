"""gsto bench step, infer, scaling: networks in time and memory."""

import json

import pytest
import torch

from gsto_benchmarks.bench import pictures, scaling, step
from gsto_benchmarks.bench.traffic import VARIANTS
from gsto_benchmarks.cli import main


@pytest.mark.parametrize("what", ["step", "infer"])
def test_command(what, tmp_path, capsys):
    command = ["bench", what, "--batch", "1", "--size", "32x64", "--rounds", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    rows = json.loads((tmp_path / f"{what}-w18_small_v2.json").read_text())["rows"]
    labels = [row["network"] for row in rows]
    assert labels[:3] == [variant.label for variant in VARIANTS] and rows[0]["ratio"] == 1.0
    assert len(rows) == (3 if what == "step" else 5)
    assert all(
        0 < row["low"] <= row["ms"] <= row["high"] and row["first_s"] > 0 and row["kernels"] > 100 for row in rows
    )
    assert "Checked before" in capsys.readouterr().out
    assert (tmp_path / f"{what}-w18_small_v2-times.png").stat().st_size > 5000


def bench(training, variant=2, size=(64, 64), device="cpu"):
    images = torch.randn(2, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 19, (2, *size), device=device)
    return step.Bench(VARIANTS[variant], "w18_small_v2", training, images, labels)


def test_peak_memory_holds_weights_momentum_and_what_backward_needs():
    """Known from outside: weights and momentum, and for four times the pixels four times the maps."""
    small, large = bench(True, size=(128, 128)), bench(True, size=(256, 256))
    small(), large()
    weights = sum(p.numel() * 4 for p in small.network.parameters())
    peaks = [step.peak_bytes(b, b) for b in (small, large)]
    assert peaks[0] > 3 * weights  # with gradients
    assert 3.5 < (peaks[1] - 2 * weights) / (peaks[0] - 2 * weights) < 4.2
    inference = bench(False)
    assert step.peak_bytes(inference, inference) < peaks[0] / 2


def test_kernels_are_counted():
    """Folding leaves out the 100 and more batch norms of the plain network."""
    plain = bench(False, variant=0)
    count = step.count_kernels(plain)
    plain.run_network = step.gsto_models.fold(plain.network)
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in plain.network.modules())
    assert norms > 100 and step.count_kernels(plain) == count - norms


def test_wrong_gradients_are_not_timed(monkeypatch):
    """A fused network that computes something else is found before the rounds."""
    loss = step.Variant.loss

    def wrong(self, outputs, labels, dtype=torch.float32):
        return loss(self, outputs, labels, dtype) * (1.1 if self.fused else 1)

    monkeypatch.setattr(step.Variant, "loss", wrong)
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(AssertionError, match="error of the fused gradients"):
        step.check_gradients("w18_small_v2", images.double().float(), torch.randint(0, 19, (2, 64, 64)))


def test_compiled_results_are_checked():
    right, wrong = bench(False), bench(False)
    step.check_compiled(right, right)
    with torch.no_grad():
        next(p for p in wrong.network.parameters()).add_(0.1)
    with pytest.raises(RuntimeError, match="under torch"):
        step.check_compiled(wrong, right)


def test_scaling(tmp_path, capsys, monkeypatch):
    sizes = [("w18_small_v2", 1, (32, 64), 32 * 64), ("w18_small_v2", 1, (64, 64), 64 * 64)]
    monkeypatch.setattr(scaling, "points", lambda axis, cuda: sizes)
    command = ["bench", "scaling", "--axis", "resolution", "--axis", "gpus", "--rounds", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "HRNetV2, plain: ms grow as pixels of an image ** " in output
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [row["pixels of an image"] for row in rows if row["axis"] == "resolution"] == [2048] * 3 + [4096] * 3
    assert {file.name for file in tmp_path.glob("*.png")} == {"scaling-resolution.png", "scaling-gpus.png"}


def test_points_grow():
    for cuda in (False, True):
        for axis in ("batch", "resolution", "width"):
            numbers = [number for *_, number in scaling.points(axis, cuda)]
            assert numbers == sorted(set(numbers)) and len(numbers) >= 3


def test_communication():
    """A ring over two GPUs sends every gradient once; HRNetV2-W48 has 65.9 M parameters (the paper's Table 5)."""
    rows = scaling.communication("w48")
    two = next(row for row in rows if row["network"] == "hrnetv2" and row["GPUs"] == 2 and row["what"] == "gradients")
    assert two["mb"] == pytest.approx(65.9 * 4, rel=0.002)
    many = [row["mb"] for row in rows if row["network"] == "hrnetv2" and row["what"] == "gradients"]
    assert many == sorted(many) and many[-1] < 2 * two["mb"]


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_slope(power):
    assert pictures.slope([1, 2, 4, 8], [3 * x**power for x in (1, 2, 4, 8)]) == pytest.approx(power, abs=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["graphed", "compiled, graphed"])
def test_graphed(way):
    entry = step.prepare(bench(True, device="cuda"), "x", way)
    assert entry.first_s > 0 and 0 < entry.peak_gib < 8


@pytest.mark.parametrize(
    "command, message",
    [
        (["bench"], "bench needs one of ops, step, infer, "),
        (["bench", "stp"], "got 'stp'"),
        (["bench", "step", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["bench", "step", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["bench", "infer", "--size", "512"], "--size must be HxW, both at least 32, for example 512x1024; got '512'"),
        (["bench", "traffic", "--size", "16x64"], "got '16x64'"),
        (["bench", "scaling", "--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_wrong_use_is_named(command, message, capsys):
    assert main(command) == 2
    assert message in capsys.readouterr().err
