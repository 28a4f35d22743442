"""DeepLabV3 with gated scale transfers against a composition of torch.nn.functional calls; its gates, outputs and cost."""

import pytest
import torch
import torch.nn.functional as F
from pyramid_heads import (
    CLASSES,
    GATES,
    C,
    bn,
    check_eval_output,
    check_network_outputs,
    check_training_outputs_and_gradients,
    class_map_of,
    gated,
    outputs_of_options,
    prepared,
)

from gsto_models import complexity, create_model, record_gates
from gsto_models.aspp import AtrousPyramid


def composition(s, x, gate, training, rates):
    """ASPP branch by branch, from the definition; `s` is its state dict. Returns [logits, class map]."""
    class_map = class_map_of(s, x)
    maps = []
    for k in range(5):
        f = gated(s, x, class_map, gate, k)
        weight = s[f"branches.{k}.0.weight"]
        if k == 4:
            f = f.mean((2, 3), keepdim=True)
        rate = rates[k - 1] if 1 <= k <= 3 else 0
        y = F.conv2d(f, weight, padding=rate, dilation=max(rate, 1))
        y = F.relu(bn(y, s, f"branches.{k}.1", training))
        maps.append(y.expand(-1, -1, *x.shape[-2:]))
    y = F.relu(bn(F.conv2d(torch.cat(maps, 1), s["fusion.0.weight"]), s, "fusion.1", training))
    return [F.conv2d(y, s["classifier.weight"], s["classifier.bias"]), class_map]


def module(gate, output_stride=16, auxiliary=False):
    shared = {"gate": gate, "gate_bias": True, "auxiliary": auxiliary, "scale_equalizer": False}
    return prepared(AtrousPyramid(C, CLASSES, output_stride=output_stride, **shared))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("output_stride", "rates"), [(16, (6, 12, 18)), (8, (12, 24, 36))])
def test_eval_output(gate, output_stride, rates):
    x = torch.randn(2, C, 29, 38, dtype=torch.float64)  # larger than most rates, so that the dilations matter
    check_eval_output(module(gate, output_stride), x, lambda s: composition(s, x, gate, False, rates))


@pytest.mark.parametrize("gate", GATES)
def test_training_outputs_and_gradients(gate):
    x = torch.randn(3, C, 13, 20, dtype=torch.float64)
    check_training_outputs_and_gradients(
        module(gate, auxiliary=True), x, lambda s: composition(s, x, gate, True, (6, 12, 18))
    )


@outputs_of_options
def test_network_outputs(options, outputs):
    check_network_outputs("deeplabv3_r50", options, outputs)


@pytest.mark.parametrize("gate", GATES[1:])
def test_gates_start_open_and_are_recorded(gate):
    model = create_model("deeplabv3_r50", num_classes=CLASSES, gate=gate, gate_bias_init=4.0)
    with torch.no_grad(), record_gates(model) as gates:
        model(torch.randn(2, 3, 64, 96))
    assert list(gates) == [f"head.gates.{name}" for name in ("conv1x1", "rate12", "rate24", "rate36", "pool")]
    for g in gates.values():
        assert g.shape == (2, 1, 8, 12)
        assert (g - 0.982).abs().max() < 0.01


def test_cost():
    pixels, size = 4 * 8, (64, 128)
    plain = complexity(create_model("deeplabv3_r50", num_classes=21, output_stride=16), size)
    gated = complexity(create_model("deeplabv3_r50", num_classes=21, output_stride=16, gate="unsupervised"), size)
    supervised = complexity(create_model("deeplabv3_r50", num_classes=21, output_stride=16, gate="supervised"), size)
    assert gated.macs_as_executed - plain.macs_as_executed == 5 * 2048 * pixels
    assert supervised.macs_as_executed == gated.macs_as_executed
    assert supervised.macs_as_defined - plain.macs_as_defined == (2048 * 21 + 21 * 5) * pixels
    # torchvision's deeplabv3_resnet50 has 42,004,074 parameters, with an auxiliary FCN head on layer3 (2,365,205) and a
    # 3x3 convolution with BatchNorm in front of the classifier (590,336), which this head has not
    assert plain.params == 42_004_074 - 2_365_205 - 590_336
