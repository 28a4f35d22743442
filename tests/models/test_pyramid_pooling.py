"""PSPNet with gated scale transfers against a composition of torch.nn.functional calls; its gates, outputs and cost."""

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

import gsto_ops
from gsto_models import complexity, create_model, record_gates
from gsto_models.pyramid_pooling import PyramidPooling


def composition(s, x, gate, training, align_corners=False):
    """The pyramid pooling module bin by bin, from the definition; `s` is its state dict. Returns [logits, class map]."""
    class_map = class_map_of(s, x)
    maps = [x]
    for k, size in enumerate((1, 2, 3, 6)):
        f = gated(s, x, class_map, gate, k)
        y = F.conv2d(F.adaptive_avg_pool2d(f, size), s[f"branches.{k}.0.weight"])
        y = F.relu(bn(y, s, f"branches.{k}.1", training))
        maps.append(F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=align_corners))
    y = F.relu(bn(F.conv2d(torch.cat(maps, 1), s["fusion.0.weight"], padding=1), s, "fusion.1", training))
    return [F.conv2d(y, s["classifier.weight"], s["classifier.bias"]), class_map]


def module(gate, gate_bias=True, auxiliary=False, align_corners=False):
    shared = {"gate": gate, "gate_bias": gate_bias, "auxiliary": auxiliary, "scale_equalizer": False}
    return prepared(PyramidPooling(C, CLASSES, align_corners=align_corners, **shared))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("options", [{}, {"gate_bias": False, "align_corners": True}], ids=str)
def test_eval_output(gate, options):
    x = torch.randn(2, C, 7, 11, dtype=torch.float64)
    align_corners = options.get("align_corners", False)
    check_eval_output(module(gate, **options), x, lambda s: composition(s, x, gate, False, align_corners))


@pytest.mark.parametrize("gate", GATES)
def test_training_outputs_and_gradients(gate):
    x = torch.randn(3, C, 7, 11, dtype=torch.float64)
    check_training_outputs_and_gradients(module(gate, auxiliary=True), x, lambda s: composition(s, x, gate, True))


@outputs_of_options
def test_network_outputs(options, outputs):
    check_network_outputs("pspnet_r50", options, outputs)


def test_order_of_the_auxiliary_output():
    model = create_model("pspnet_r50", num_classes=CLASSES, gate="supervised")
    with torch.no_grad():
        for value, layer in ((1, model.head.classifier), (2, model.head.predictor)):
            layer.weight.zero_()
            layer.bias.fill_(value)
        assert [m.unique().item() for m in model(torch.randn(2, 3, 64, 64))] == [1, 2]


@pytest.mark.parametrize(("bias", "value"), [(None, 0.5), (4.0, 0.982)])
@pytest.mark.parametrize("gate", GATES[1:])
def test_gates_start_at_their_bias_and_are_recorded(gate, bias, value):
    model = create_model("pspnet_r50", num_classes=CLASSES, gate=gate, gate_bias_init=bias).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        plain = model(image)
        with record_gates(model) as gates:
            assert torch.equal(model(image), plain)
    assert list(gates) == [f"head.gates.bin{b}" for b in (1, 2, 3, 6)]
    with record_gates(model.train()) as gates:  # in eval mode the activations of a fresh network are large
        model(image)
    for g in gates.values():
        assert g.shape == (2, 1, 8, 12)
        assert (g - value).abs().max() < (0.1 if bias is None else 0.01)
    assert (model.head.gates.conv.bias is None) == (bias is None)


def test_recorded_gates_are_those_of_their_bins():
    model = module("unsupervised").eval()
    x = torch.randn(2, C, 6, 6, dtype=torch.float64)
    with torch.no_grad(), record_gates(model) as gates:
        model(x)
    for k, b in enumerate((1, 2, 3, 6)):
        conv = model.gates.conv
        expected = torch.sigmoid((conv.weight[k, :, 0, 0, None, None] * x).sum(1) + conv.bias[k])[:, None]
        torch.testing.assert_close(gates[f"gates.bin{b}"], expected)


def test_cost():
    pixels, size = 8 * 16, (64, 128)
    plain = complexity(create_model("pspnet_r50"), size)
    ungated = complexity(create_model("pspnet_r50", gate="unsupervised"), size)
    supervised = complexity(create_model("pspnet_r50", gate="supervised"), size)
    assert ungated.macs_as_defined - plain.macs_as_defined == 4 * 2048 * pixels
    assert ungated.macs_as_executed == ungated.macs_as_defined
    assert supervised.macs_as_executed == ungated.macs_as_executed  # the class map folds into the gates
    assert supervised.macs_as_defined - plain.macs_as_defined == (2048 * 19 + 19 * 4) * pixels
    assert supervised.params - plain.params == 2049 * 19 + 19 * 4
    # PPM: four 1x1 convolutions 2048 -> 512, 3x3 convolution 4096 -> 512, classifier
    head = 4 * (2048 * 512 + 1024) + 9 * 4096 * 512 + 1024 + 513 * 19
    assert plain.params == 25_557_032 - 2_049_000 + head


def test_pyramid_operator_is_counted():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return torch.ops.gsto_ops.gated_pyramid_pool(x, self.gate.weight, self.gate.bias, [1, 4])[0]

    cost = complexity(Net(), (8, 16))
    assert cost.macs_as_defined == cost.macs_as_executed == 2 * 3 * 8 * 16


@pytest.mark.parametrize("backend", gsto_ops.available_backends())
def test_every_backend_makes_the_same_map(backend):
    model = module("supervised").float().eval()
    x = torch.randn(2, C, 9, 10)
    with torch.no_grad():
        expected = composition(model.state_dict(), x, "supervised", False)[0]
        with gsto_ops.use_backend(backend):
            torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-4)
