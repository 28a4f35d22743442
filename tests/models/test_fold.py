"""gsto_models.fold on every kind of network: outputs in float64 as before, and what is gone."""

from functools import partial

import pytest
import torch
from torch import nn

from gsto_models import create_model, fold, record_gates
from gsto_models.aspp import AtrousPyramid
from gsto_models.config import TASKS, Options, Trunk
from gsto_models.hrnet import HRNet
from gsto_models.pyramid_pooling import PyramidPooling

TINY = Trunk(width=4, stage1_blocks=1, modules=(1, 1, 1), blocks=1)
GSTO = {"gated_fusion": True, "gated_transition": (2, 3)}
HRNETS = {
    "plain": {},
    "paper gates": GSTO,
    "open paper gates": GSTO | {"gate_bias_init": 4.0},
    "released gates": GSTO | {"gate_form": "released"},
    "paper transition": GSTO | {"transition_form": "paper"},
    "unsupervised transition": GSTO | {"transition_supervision": False},
    "transition after stage 1": GSTO | {"gated_transition": (1, 2, 3)},
    "channel gates": GSTO | {"gate_kind": "channel"},
    "gates after layers": GSTO | {"gate_position": "layer"},
    "gates after blocks": GSTO | {"gate_position": "block"},
    "auxiliary supervision": {"auxiliary_supervision": (1, 2)},
    "scale equalizer": GSTO | {"scale_equalizer": True},
    "single output, nearest": {"multi_scale_output": False, "upsampling": "nearest"},
}
WITHOUT_PREDICTOR = (
    "plain",
    "paper transition",
    "unsupervised transition",
    "auxiliary supervision",
    "single output, nearest",
)
HEADS = {
    f"{name} {gate} {auxiliary}": (head, gate, auxiliary)
    for name, head in (("PPM", PyramidPooling), ("ASPP", partial(AtrousPyramid, output_stride=16)))
    for gate in (None, "unsupervised", "supervised")
    for auxiliary in (True, False)
}


def trained_looking(model):
    """Weights and statistics with which the signal neither dies nor explodes, in float64, in eval mode."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1)
            nn.init.normal_(part.bias, std=0.5)
            nn.init.normal_(part.running_mean, std=0.5)
            nn.init.uniform_(part.running_var, 1, 3)
    for name, buffer in model.named_buffers():
        if name.endswith(("level_mean", "level_std")):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.double().eval()


def check(model, x=None):
    x = torch.randn(1, 3, 39, 70, dtype=torch.float64) if x is None else x
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold(model)
    with torch.no_grad():
        expected, output = (y[0] if isinstance(y, list) else y for y in (model(x), folded(x)))
    torch.testing.assert_close(output, expected, atol=1e-10 * float(expected.abs().max()), rtol=1e-10)
    assert expected.std() > 1e-3
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return folded


@pytest.mark.parametrize("case", HRNETS)
def test_hrnet(case):
    model = trained_looking(HRNet(TINY, 5, TASKS["segmentation"], Options(**HRNETS[case])))
    folded = check(model)
    norms = [name for name, part in folded.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert all((name.startswith("stage") and ".fuse_layers." in name) or ".att_layers." in name for name in norms), (
        norms
    )
    predictors = [name for name, _ in folded.named_parameters() if "last_layer_stage" in name or "predictor" in name]
    supervised = (
        case not in ("plain", "paper transition", "unsupervised transition", "auxiliary supervision")
        and "nearest" not in case
    )
    assert bool(predictors) == supervised


@pytest.mark.parametrize("case", HEADS)
def test_heads(case):
    head, gate, auxiliary = HEADS[case]
    options = {"gate": gate, "auxiliary": auxiliary, "gate_bias": True, "scale_equalizer": auxiliary}
    folded = check(trained_looking(head(16, 5, **options)), torch.randn(2, 16, 9, 13, dtype=torch.float64))
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert folded.predictor is None
    if gate is not None:
        assert folded.gates.conv.in_channels == 16


@pytest.mark.parametrize("name", ["pspnet_r50", "rsp_r50"])
def test_networks_on_resnet(name):
    check(trained_looking(create_model(name, 5)))


def test_gates_can_still_be_recorded():
    model = trained_looking(HRNet(TINY, 5, TASKS["segmentation"], Options(**GSTO, transition_form="paper")))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    found = []
    for network in (model, fold(model)):
        with record_gates(network) as gates, torch.no_grad():
            network(x)
        found.append(gates)
    torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=1e-10)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="must be in eval mode to be folded"):
        fold(HRNet(TINY, 5, TASKS["segmentation"], Options()))
