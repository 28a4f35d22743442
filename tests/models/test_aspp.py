"""DeepLabV3 with gated scale transfers against a composition of torch.nn.functional calls; its gates, outputs and cost."""

import pytest
import torch
import torch.nn.functional as F

from gsto_models import complexity, create_model, record_gates
from gsto_models.aspp import AtrousPyramid

GATES = [None, "unsupervised", "supervised"]
C, CLASSES = 16, 5


def bn(x, s, key, training):
    stats = [s[f"{key}.running_mean"].clone(), s[f"{key}.running_var"].clone()]
    return F.batch_norm(x, *stats, s[f"{key}.weight"], s[f"{key}.bias"], training)


def composition(s, x, gate, training, rates):
    """ASPP branch by branch, from the definition; `s` is its state dict. Returns [logits, class map]."""
    class_map = None
    if "predictor.weight" in s:
        class_map = F.conv2d(x, s["predictor.weight"], s["predictor.bias"])
    maps = []
    for k in range(5):
        f = x
        if gate is not None:
            logit = F.conv2d(class_map if gate == "supervised" else x, s["gates.conv.weight"][k : k + 1])
            f = torch.sigmoid(logit + s["gates.conv.bias"][k]) * x
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
    model = AtrousPyramid(C, CLASSES, output_stride=output_stride, **shared).double()
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d) and m.bias is not None:
            m.bias.data.normal_(0, 0.5)
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.5)
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.2, 0.5)
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    return model


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("output_stride", "rates"), [(16, (6, 12, 18)), (8, (12, 24, 36))])
def test_eval_output(gate, output_stride, rates):
    model = module(gate, output_stride).eval()
    x = torch.randn(2, C, 29, 38, dtype=torch.float64)  # larger than most rates, so that the dilations matter
    with torch.no_grad():
        found = model(x)
        expected = composition(model.state_dict(), x, gate, False, rates)[0]
    assert len(found) == 1
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-10)
    assert expected.std(dim=(2, 3)).min() > 0.01


@pytest.mark.parametrize("gate", GATES)
def test_training_outputs_and_gradients(gate):
    model = module(gate, auxiliary=True)
    x = torch.randn(3, C, 13, 20, dtype=torch.float64)
    params = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    expected = composition({**model.state_dict(), **params}, x, gate, True, (6, 12, 18))
    found = model(x)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)
    weights = [torch.randn_like(f) for f in found]
    sum((f * w).sum() for f, w in zip(found, weights, strict=True)).backward()
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, params[name].grad, rtol=1e-8, atol=1e-10, msg=name)
        assert p.grad.any(), name


@pytest.mark.parametrize(
    ("options", "outputs"),
    [({}, 1), ({"auxiliary": True}, 2), ({"gate": "unsupervised"}, 1), ({"gate": "supervised"}, 2)],
    ids=str,
)
def test_network_outputs(options, outputs):
    model = create_model("deeplabv3_r50", num_classes=CLASSES, output_stride=16, **options)
    maps = model(torch.randn(2, 3, 64, 96))
    assert [m.shape for m in maps] == [(2, CLASSES, 4, 6)] * outputs
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 65, 97)).shape == (1, CLASSES, 5, 7)


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
