"""How the networks behave: outputs, gradients, gates, compilation, copies, layouts, bad input."""

import copy
import io
import pickle

import pytest
import torch

from gsto_models import create_model, list_models, record_gates

FORMS = ["paper", "released"]


def small(**options):
    return create_model("gsto_hrnet_w18_small_v2", num_classes=5, **options)


@pytest.mark.parametrize("name", [n for n in list_models() if "hrnet" in n and "w48" not in n])  # w48: test_complexity
def test_every_model_runs(name):
    model = create_model(name, num_classes=19).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 64)).shape == (1, 19, 8, 16)


@pytest.mark.parametrize(("stages", "outputs"), [((), 1), ((2,), 2), ((3,), 2), ((2, 3), 3)])
def test_outputs_in_training(stages, outputs):
    maps = small(gated_transition=stages)(torch.randn(2, 3, 64, 64))
    assert isinstance(maps, list) and [m.shape for m in maps] == [(2, 5, 16, 16)] * outputs


def test_order_of_the_auxiliary_outputs():
    model = small()
    with torch.no_grad():
        for value, layer in [(1, model.last_layer), (2, model.last_layer_stage3), (3, model.last_layer_stage2)]:
            layer[3].weight.zero_()
            layer[3].bias.fill_(value)
        assert [m.unique().item() for m in model(torch.randn(2, 3, 64, 64))] == [1, 2, 3]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (63, 100)])
def test_sizes_that_do_not_divide(size):
    model = small()
    shape = (2, 5, -(-size[0] // 4), -(-size[1] // 4))
    assert [m.shape for m in model(torch.randn(2, 3, *size))] == [shape] * 3
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, *size)).shape == (1, *shape[1:])


@pytest.mark.parametrize(
    ("input", "error"),
    [
        (torch.zeros(3, 64, 64), ValueError),
        (torch.zeros(1, 4, 64, 64), ValueError),
        (torch.zeros(1, 3, 31, 64), ValueError),
        (torch.zeros(1, 3, 64, 16), ValueError),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError),
    ],
)
def test_bad_input(input, error):
    with pytest.raises(error, match="input must be"):
        small()(input)


@pytest.mark.parametrize(
    "options", [{"gate_form": f, "gate_bias_init": b} for f in FORMS for b in (None, 4.0)], ids=str
)
def test_gradients_reach_every_parameter(options):
    model = small(**options)
    maps = model(torch.randn(2, 3, 64, 64))
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The convolutions in front of the head's BatchNorm have a bias that BatchNorm's mean takes away again.
    assert [name for name in missing if not name.endswith(".0.bias") or "last_layer" not in name] == []
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("gate_form", FORMS)
def test_gates_start_open(gate_form):
    model = small(gate_form=gate_form, gate_bias_init=4.0).eval()
    with torch.no_grad(), record_gates(model) as gates:
        model(torch.randn(1, 3, 64, 64))
    for name, gate in gates.items():
        assert gate.sub(0.982).abs().max() < 0.002, name


@pytest.mark.parametrize("gate_form", FORMS)
def test_record_gates(gate_form):
    model = small(gate_form=gate_form)
    image = torch.randn(2, 3, 64, 96)
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]
    expected = {"att2": (2, 1, *sizes[1]), "att3": (2, 1, *sizes[2])}
    for stage, modules in ((2, 1), (3, 3), (4, 2)):
        for m in range(modules):
            for i in range(stage):
                for j in range(stage):
                    expected[f"stage{stage}.{m}.att_layers.{i}.{j}"] = (2, 1, *sizes[j])
    model.eval()
    with torch.no_grad():
        plain = model(image)
        with record_gates(model) as gates:
            assert gates == {}
            recorded = model(image)
    assert {name: tuple(gate.shape) for name, gate in gates.items()} == expected
    assert torch.equal(plain, recorded)
    low = 0.5 if gate_form == "released" else 0
    assert all(low <= gate.min() and gate.max() <= 1 and not gate.requires_grad for gate in gates.values())
    gates.clear()
    model(image)
    assert gates == {}


def test_record_gates_gives_the_gate_that_is_applied():
    model = small()
    with torch.no_grad():
        model.stage4[1].att_layers[0][3][0].weight.fill_(1.0)
        features = []
        model.stage4[1].branches[3].register_forward_hook(lambda module, inputs, output: features.append(output))
        with record_gates(model) as gates:
            model(torch.randn(2, 3, 64, 64))
    expected = torch.sigmoid(features[0].sum(1, keepdim=True))
    torch.testing.assert_close(gates["stage4.1.att_layers.0.3"], expected)


def test_record_gates_of_a_network_without_gates_is_empty():
    model = create_model("hrnetv2_w18_small_v2").eval()
    with torch.no_grad(), record_gates(model) as gates:
        model(torch.randn(1, 3, 32, 32))
    assert gates == {}


@pytest.mark.parametrize("gate_form", FORMS)
def test_compiles_without_graph_breaks(gate_form):
    torch._dynamo.reset()
    model = small(gate_form=gate_form).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(image)
        torch.testing.assert_close(found, model(image))
    torch._dynamo.reset()


def test_compiles_for_training_without_graph_breaks():
    torch._dynamo.reset()
    model = small().double()
    twin = copy.deepcopy(model)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    found, expected = torch.compile(model, fullgraph=True, backend="aot_eager")(image), twin(image)
    torch.testing.assert_close(found, expected)
    for maps in (found, expected):
        sum(m.square().sum() for m in maps).backward()
    largest = max(p.grad.abs().max() for p in twin.parameters())
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-8 * b.grad.norm() + 1e-11 * largest, name
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies(copied):
    model = small(gate_bias_init=4.0).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(copied(model)(image), model(image))


def test_state_dict_round_trip():
    model, other = small().eval(), small().eval()
    image = torch.randn(1, 3, 64, 64)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        assert not torch.equal(other(image), model(image))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(image), model(image))


def test_channels_last():
    model = small().double().eval()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = model(image)
        found = model.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)
