"""A network whose gates start open is the HRNetV2 that its weights came from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gsto_models import absorb_initial_gates, create_model


def images():
    smooth = F.interpolate(torch.randn(3, 3, 8, 8), size=(64, 64), mode="bicubic")
    return smooth + 0.3 * torch.randn(3, 3, 64, 64)


@pytest.fixture(scope="module")
def hrnet():
    """HRNetV2 with lifelike activations: He weights, random BatchNorm, statistics of real batches."""
    torch.manual_seed(0)
    model = create_model("hrnetv2_w18_small_v2", num_classes=7)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = None  # running averages over all batches
    with torch.no_grad():
        for _ in range(3):
            model(images())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # and now they stay
    return model


def opened(hrnet, **options):
    model = create_model("gsto_hrnet_w18_small_v2", num_classes=7, **options)
    found = model.load_state_dict(hrnet.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all("att" in key or "last_layer_stage" in key for key in found.missing_keys)
    return model


def deviation(model, hrnet, training=False):
    image = images()
    with torch.no_grad():
        found, expected = model.train(training)(image), hrnet.train(training)(image)
    if training:
        found, expected = found[0], expected[0]
    return ((found - expected).norm() / expected.norm()).item()


OPTIONS = [
    {"gate_bias_init": 4.0},
    {"gate_bias_init": 4.0, "gate_form": "released"},
    {"gate_bias_init": 4.0, "gated_transition": (3,)},
    {"gate_bias_init": 4.0, "gated_fusion": False},
    {"gate_bias_init": 4.0, "gated_transition": (1, 2, 3)},
    {"gate_bias_init": 4.0, "gated_transition": (1, 2), "transition_supervision": False},
    {"gate_bias_init": 4.0, "gate_kind": "channel"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_within_two_percent_of_hrnet(hrnet, options):
    model = opened(hrnet, **options)
    absorb_initial_gates(model)
    assert deviation(model, hrnet) < 0.02


def test_half_open_gates_of_the_paper_can_be_absorbed_too(hrnet):
    model = opened(hrnet)
    assert deviation(model, hrnet) > 0.5
    absorb_initial_gates(model)
    assert deviation(model, hrnet) < 0.05  # at 0.5 a gate's own weights show more than at 0.98


def test_in_training_mode_too(hrnet):
    # Paper-form gates only: a BatchNorm inside a gate spreads its logits to unit variance as soon as it sees a batch.
    model = opened(hrnet, gate_bias_init=4.0, gated_transition=())
    absorb_initial_gates(model)
    assert deviation(model, hrnet, training=True) < 0.02


def test_wide_open_gates_need_no_rescaling(hrnet):
    errors = [deviation(opened(hrnet, gate_bias_init=bias), hrnet) for bias in (4.0, 6.0, 8.0)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] > 0.02 > errors[2]  # 0.98 compounds over the modules, 0.9997 hardly does


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_position": "block", "gated_transition": ()}, "gate_position='transfer' can be absorbed, got 'block'"),
        ({"transition_form": "paper"}, "transition_form='paper' replaces"),
    ],
)
def test_what_cannot_be_absorbed(options, message):
    with pytest.raises(ValueError, match=message):
        absorb_initial_gates(create_model("gsto_hrnet_w18_small_v2", **options))


def test_nothing_to_absorb_without_gates():
    model = create_model("hrnetv2_w18_small_v2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    absorb_initial_gates(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
