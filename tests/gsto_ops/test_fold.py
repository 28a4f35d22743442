"""gsto_ops.fold: outputs in float64 as before, what is gone, what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gsto_ops
from gsto_ops import GatedScaleTransfer


def with_statistics(module):
    """The module in float64 and eval mode, with batch norms that do something."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            if part.running_mean is not None:
                nn.init.normal_(part.running_mean)
                nn.init.uniform_(part.running_var, 0.5, 2)
    return module.double().eval()


@pytest.mark.parametrize("gate_bias_init", [None, 4.0])
@pytest.mark.parametrize("num_classes", [None, 5])
@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("out_channels", [None, 7])
def test_a_transfer(out_channels, norm, num_classes, gate_bias_init):
    options = {"norm": norm, "num_classes": num_classes, "gate_bias_init": gate_bias_init}
    module = with_statistics(GatedScaleTransfer(6, out_channels, scale_factor=2, **options))
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    expected = module(x)
    folded = gsto_ops.fold(module)
    output = folded(x)
    assert isinstance(output, torch.Tensor), "the class map was not asked for"
    torch.testing.assert_close(output, expected[0] if num_classes else expected, atol=1e-10, rtol=1e-10)
    assert folded.predictor is None and folded.norm is None and folded.gate.weight.shape == (1, 6, 1, 1)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items()) and before.keys() == set(
        module.state_dict()
    )
    kept = gsto_ops.fold(module, class_map=True)
    torch.testing.assert_close(kept(x), expected, atol=1e-10, rtol=1e-10)
    assert kept.norm is None


class Shared(nn.Module):
    """The convolution is called with its batch norm and without it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.layers = nn.Sequential(self.conv, nn.BatchNorm2d(3))

    def forward(self, x):
        return self.layers(x) + self.conv(x)


def test_sequences_of_convolution_and_norm():
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(6, 6, 1, groups=2), nn.ReLU(), nn.BatchNorm2d(6)),
        GatedScaleTransfer(6, 4, scale_factor=2),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4, track_running_stats=False),
        parametrizations.weight_norm(nn.Conv2d(4, 3, 1)),
        nn.BatchNorm2d(3),
        Shared(),
    )
    network = with_statistics(network)
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    folded = gsto_ops.fold(network)
    torch.testing.assert_close(folded(x), network(x), atol=1e-10, rtol=1e-10)
    norms = [name for name, part in folded.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms == ["3.2", "6", "8", "9.layers.1"], "only what has its own convolution right before it can be folded"
    assert not any(part.training for part in folded.modules())


def test_training_mode_is_refused():
    message = r"call eval\(\) first; in training mode: GatedScaleTransfer, gate, projection and 2 more$"
    with pytest.raises(ValueError, match=message):
        gsto_ops.fold(GatedScaleTransfer(6, 7, scale_factor=2).train())
    module = GatedScaleTransfer(6, 7, scale_factor=2).eval()
    module.norm.train()
    with pytest.raises(ValueError, match=r"in training mode: norm$"):
        gsto_ops.fold(module)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got list"):
        gsto_ops.fold([])
