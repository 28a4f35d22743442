"""GatedScaleTransfer: the order of its steps, its options, its state, its errors."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gsto_ops
from gsto_ops import GatedScaleTransfer


def by_hand(module, x, size, mode):
    """Fig. 2: (class map,) gate, multiply, project, norm, activation, resample."""
    logits = x if module.predictor is None else module.predictor(x)
    y = x * module.gate(logits).sigmoid()
    for step in (module.projection, module.norm, module.activation):
        y = y if step is None else step(y)
    return F.adaptive_avg_pool2d(y, size) if mode == "avg" else F.interpolate(y, size=size, mode=mode)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_classes", [None, 5])
@pytest.mark.parametrize("norm, activation", [("batch", "relu"), ("batch", None), (None, "relu"), (None, None)])
@pytest.mark.parametrize("out_channels", [None, 7])
@pytest.mark.parametrize("scale_factor, mode", [(2, "bilinear"), (0.5, "avg")])
def test_equals_its_steps(scale_factor, mode, out_channels, norm, activation, num_classes, training):
    module = GatedScaleTransfer(
        6, out_channels, scale_factor=scale_factor, num_classes=num_classes, norm=norm, activation=activation
    )
    module = module.double().train(training)
    x = torch.randn(2, 6, 8, 12, dtype=torch.float64)
    expected = by_hand(copy.deepcopy(module), x, (int(8 * scale_factor), int(12 * scale_factor)), mode)
    output = module(x)
    if num_classes:
        output, class_map = output
        torch.testing.assert_close(class_map, module.predictor(x))
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)


def test_running_statistics_are_updated():
    module = GatedScaleTransfer(6, 7, scale_factor=2)
    module(torch.randn(2, 6, 8, 8) + 3)
    assert module.norm.num_batches_tracked == 1 and module.norm.running_mean.abs().max() > 0


def test_parts_exist_only_where_channels_change():
    same = GatedScaleTransfer(6, scale_factor=2)
    assert [name for name, _ in same.named_parameters()] == ["gate.weight"]
    changed = GatedScaleTransfer(6, 7, scale_factor=2)
    assert set(dict(changed.named_parameters())) == {"gate.weight", "projection.weight", "norm.weight", "norm.bias"}
    assert GatedScaleTransfer(6, 7, scale_factor=2, norm=None).projection.bias is not None


def test_gates_can_start_open():
    module = GatedScaleTransfer(6, scale_factor=1, gate_bias_init=4.0)
    nn.init.zeros_(module.gate.weight)
    x = torch.randn(1, 6, 4, 4)
    torch.testing.assert_close(module(x), x * torch.sigmoid(torch.tensor(4.0)))
    module(x).sum().backward()
    assert module.gate.bias.grad is not None


def test_size_from_module_or_call():
    x = torch.randn(1, 6, 8, 8)
    assert GatedScaleTransfer(6, size=(3, 5))(x).shape[2:] == (3, 5)
    assert GatedScaleTransfer(6)(x, size=16).shape[2:] == (16, 16)
    assert GatedScaleTransfer(6, scale_factor=2)(x, size=(8, 4)).shape[2:] == (8, 4)
    with pytest.raises(ValueError, match="size must be given to forward"):
        GatedScaleTransfer(6)(x)


def test_auto_pools_down_and_interpolates_up():
    x = torch.randn(1, 6, 8, 8)
    module = GatedScaleTransfer(6)
    gated = x * module.gate(x).sigmoid()
    torch.testing.assert_close(module(x, size=(4, 8)), F.adaptive_avg_pool2d(gated, (4, 8)))
    torch.testing.assert_close(module(x, size=(4, 16)), F.interpolate(gated, size=(4, 16), mode="bilinear"))
    corners = GatedScaleTransfer(6, align_corners=True)
    expected = F.interpolate(x * corners.gate(x).sigmoid(), size=13, mode="bilinear", align_corners=True)
    torch.testing.assert_close(corners(x, size=13), expected)


def test_copies_and_pickles():
    module = GatedScaleTransfer(6, 7, scale_factor=2, num_classes=3, gate_bias_init=0).eval()
    x = torch.randn(1, 6, 4, 4)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), module(x))
    fresh = GatedScaleTransfer(6, 7, scale_factor=2, num_classes=3, gate_bias_init=0).eval()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh(x), module(x))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"in_channels": 0}, ValueError, "in_channels must be a positive int, got 0"),
        ({"out_channels": -1}, ValueError, "out_channels must be a positive int or None, got -1"),
        ({"num_classes": 0}, ValueError, "num_classes must be a positive int or None, got 0"),
        ({"size": 2, "scale_factor": 2}, ValueError, "not both"),
        ({"scale_factor": -2}, ValueError, "scale_factor must be a positive number"),
        ({"size": (2, 0)}, ValueError, "size must be a positive int"),
        ({"mode": "area"}, ValueError, "mode must be one of"),
        ({"norm": "layer"}, ValueError, "norm must be 'batch' or None, got 'layer'"),
        ({"activation": "gelu"}, ValueError, "activation must be 'relu' or None, got 'gelu'"),
        ({"align_corners": True, "mode": "avg"}, ValueError, "align_corners=True is for bilinear"),
        ({"gate_bias_init": "open"}, TypeError, "gate_bias_init must be a number or None, got 'open'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        GatedScaleTransfer(**{"in_channels": 6} | arguments)


def test_bad_input():
    module = GatedScaleTransfer(6, scale_factor=2)
    with pytest.raises(ValueError, match=r"x must have in_channels=6 channels, got shape \(1, 5, 4, 4\)"):
        module(torch.randn(1, 5, 4, 4))
    with pytest.raises(ValueError, match="4 dimensions"):
        module(torch.randn(6, 4, 4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "batch without statistics", "sync-like", "group", "none"])
def test_gated_norm_transfer_equals_its_steps(norm, training):
    """Every kind of norm, with running statistics afterwards as the norm's own forward leaves them; gradients too."""

    class OtherNorm(nn.BatchNorm2d):  # a subclass, as SyncBatchNorm is one: must run by itself
        pass

    modules = {
        "batch": nn.BatchNorm2d(7, momentum=0.3),
        "batch without statistics": nn.BatchNorm2d(7, track_running_stats=False),
        "sync-like": OtherNorm(7, momentum=None),
        "group": nn.GroupNorm(7, 7),
        "none": None,
    }
    module = modules[norm]
    gate, projection = nn.Conv2d(6, 1, 1).double(), nn.Conv2d(6, 7, 1, bias=module is None).double()
    if module is not None:
        module = module.double().train(training)
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
        if getattr(module, "running_var", None) is not None:
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    x = torch.randn(2, 6, 5, 9, dtype=torch.float64, requires_grad=True)
    twin = copy.deepcopy(module)

    y = projection(x * gate(x).sigmoid())
    expected = F.interpolate((y if twin is None else twin(y)).relu(), size=(11, 12), mode="bilinear")
    output = gsto_ops.gated_norm_transfer(
        x, gate.weight, gate.bias, projection, module, activation="relu", size=(11, 12), mode="bilinear"
    )
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
    if module is not None:
        for key, value in module.state_dict().items():
            torch.testing.assert_close(value, twin.state_dict()[key], msg=key)
    leaves = [x, *gate.parameters(), *projection.parameters()]
    seed = torch.randn_like(output)
    actual = torch.autograd.grad(output, leaves, seed)
    for a, e in zip(actual, torch.autograd.grad(expected, leaves, seed), strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


def test_one_value_per_channel_cannot_be_normalised():
    with pytest.raises(ValueError, match="more than one value per channel"):
        GatedScaleTransfer(6, 7, scale_factor=2)(torch.randn(1, 6, 1, 1))


def test_cumulative_momentum():
    module = GatedScaleTransfer(6, 7, scale_factor=1)
    module.norm.momentum = None
    batches = torch.randn(3, 2, 6, 4, 4)
    for batch in batches:
        module(batch)
    twin = nn.BatchNorm2d(7, momentum=None)
    for batch in batches:
        twin(module.projection(batch * module.gate(batch).sigmoid()))
    torch.testing.assert_close(module.norm.running_mean, twin.running_mean)
    torch.testing.assert_close(module.norm.running_var, twin.running_var)
