"""The gates of the paper's Table 3. That they compute what they are defined to is in test_numerics."""

import itertools

import pytest
import torch

from gsto_models import complexity, create_model, record_gates

KINDS, POSITIONS = ("channel", "spatial"), ("transfer", "block", "layer")
RIVALS = [pair for pair in itertools.product(KINDS, POSITIONS) if pair != ("spatial", "transfer")]


def small(kind, position, **options):
    options = {"gated_transition": (), "num_classes": 5, **options}
    return create_model("gsto_hrnet_w18_small_v2", gate_kind=kind, gate_position=position, **options)


# The paper prints two decimals of millions and one of GFLOPs, and not the form of the gates: the spatial form follows
# from its numbers, the reduction of channel gates is one of several that do; see gsto_models.rival_gates.
@pytest.mark.parametrize(
    ("kind", "position", "paper_params", "paper_gflops", "params", "gflops"),
    [
        ("channel", "block", "3.93", "71.6", 3_926_604, 71.579),
        ("spatial", "block", "3.92", "71.7", 3_924_953, 71.672),
        ("channel", "layer", "3.94", "71.6", 3_942_917, 71.579),
        ("spatial", "layer", "3.93", "72.1", 3_931_323, 72.086),
        ("channel", "transfer", "3.94", "71.6", 3_935_672, 71.579),
        ("spatial", "transfer", "3.93", "71.7", 3_926_493, 71.653),
    ],
)
def test_table_3(kind, position, paper_params, paper_gflops, params, gflops):
    cost = complexity(small(kind, position, num_classes=19), (1024, 2048))
    assert f"{cost.conv_params / 1e6:.2f}" == paper_params
    assert f"{cost.gflops:.1f}" == paper_gflops
    assert cost.conv_params == params
    assert cost.gflops == pytest.approx(gflops, abs=6e-4)


GATES = {"transfer": 1 * 4 + 3 * 9 + 2 * 16, "block": 1 * 2 + 3 * 3 + 2 * 4, "layer": 2 + 2 * 3 + 4 * (2 + 9 + 8)}


@pytest.mark.parametrize(("kind", "position"), RIVALS)
def test_gates(kind, position):
    model = small(kind, position, gate_bias_init=4.0).eval()
    with torch.no_grad(), record_gates(model) as gates:
        model(torch.randn(2, 3, 64, 96))
    assert len(gates) == GATES[position]
    name = {
        "transfer": "stage4.1.att_layers.0.3",
        "block": "stage4.1.block_gates.3",
        "layer": "stage4.1.branches.3.1.gate2",
    }
    assert gates[name[position]].shape == ((2, 144, 1, 1) if kind == "channel" else (2, 1, 2, 3))
    for gate in gates.values():
        assert gate.sub(0.982).abs().max() < 0.02


@pytest.mark.parametrize(("kind", "position"), RIVALS)
def test_wide_open_gates_leave_the_network_as_it_is(kind, position):
    model = small(kind, position, gate_bias_init=60.0).double().eval()
    plain = create_model("hrnetv2_w18_small_v2", num_classes=5).double().eval()
    found = plain.load_state_dict(model.state_dict(), strict=False)
    assert not found.missing_keys and found.unexpected_keys
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(image), plain(image))


@pytest.mark.parametrize(("kind", "position"), RIVALS)
def test_gradients_reach_every_gate(kind, position):
    model = small(kind, position, gate_bias_init=1.0)
    (output,) = model(torch.randn(2, 3, 64, 64))
    (output * torch.randn_like(output)).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in missing if name != "last_layer.0.bias"] == []  # BatchNorm's mean takes that one away again
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_without_a_first_bias():
    channel, spatial = small("channel", "block"), small("spatial", "block")
    assert (channel.stage4[0].block_gates[3].layers[3].bias == 0).all()
    assert spatial.stage4[0].block_gates[3].conv.bias is None
    image = torch.randn(2, 3, 32, 32)
    for model in (channel, spatial):
        with torch.no_grad(), record_gates(model) as gates:
            model(image)
        assert all(gate.sub(0.5).abs().max() < 0.1 for gate in gates.values())


def test_with_gated_transitions_and_one_output():
    model = small("channel", "block", gated_transition=(2, 3), multi_scale_output=False)
    assert len(model.stage4[1].block_gates) == 1
    assert [m.shape for m in model(torch.randn(2, 3, 64, 64))] == [(2, 5, 16, 16)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_kind": "both"}, "gate_kind must be one of .*channel.*'both'"),
        ({"gate_position": "stage"}, "gate_position must be one of .*block.*'stage'"),
        ({"gate_kind": "channel", "gated_fusion": False}, "gate_kind='channel' .* needs gated_fusion=True"),
        ({"gate_position": "layer", "gate_form": "released"}, "gate_form='released' .* gate_position='layer'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("gsto_hrnet_w18_small_v2", **options)
