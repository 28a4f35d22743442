"""Gated transitions: after any stages, in both forms, supervised or not; and class maps without gates.

That they compute what they are defined to is in test_numerics.
"""

import functools
import itertools

import pytest
import torch

from gsto_models import complexity, create_model, record_gates
from gsto_models.gated_transition import TransitionTransfer

WIDTHS = [18, 36, 72, 144]
LEVELS = {1: 256, 2: 18 + 36, 3: 18 + 36 + 72}  # channels of U
LOWEST = {1: 256, 2: 36, 3: 72}  # channels of the lowest branch
FORMS = list(itertools.product(("released", "paper"), (True, False)))


def small(**options):
    return create_model("gsto_hrnet_w18_small_v2", **{"num_classes": 5, **options})


def test_table_2_transitions_after_all_stages():
    cost = complexity(small(num_classes=19, gated_transition=(1, 2, 3)), (1024, 2048))
    assert cost.conv_params == 4_020_138  # 4.02M
    assert cost.gflops == pytest.approx(83.021, abs=5e-4)  # 83.0


def cost_of_a_transition(stage, form, supervised, classes):
    """Convolution parameters, and multiply-adds for one pixel at 1/4, beyond those of a plain transition."""
    u, new = LEVELS[stage], WIDTHS[stage]
    chain = sum(9 / 4**k for k in range(1, stage))
    if form == "released" and supervised:
        predictor = u * u + u * classes
        return predictor + u + classes + 9 * classes + 9 * (stage - 1), predictor + 9 * classes + chain
    if form == "released":
        return u + 9 * (stage - 1), u + chain
    gate = u * classes + classes if supervised else u
    plain = 9 * LOWEST[stage] * new  # the convolution that the projection of U stands in for
    return gate + (classes if supervised else 0) + u * new - plain, gate + u * new - plain / 4**stage


@functools.cache
def plain_cost():
    return complexity(small(gated_fusion=False, gated_transition=()), (512, 1024))


@pytest.mark.parametrize(("form", "supervised"), FORMS)
@pytest.mark.parametrize("stages", [(1,), (2, 3)])
def test_costs(stages, form, supervised):
    plain = plain_cost()
    options = {"transition_form": form, "transition_supervision": supervised, "gated_fusion": False}
    cost = complexity(small(gated_transition=stages, **options), (512, 1024))
    extra = [cost_of_a_transition(stage, form, supervised, 5) for stage in stages]
    assert cost.conv_params - plain.conv_params == sum(params for params, _ in extra)
    assert cost.macs_as_defined - plain.macs_as_defined == sum(macs for _, macs in extra) * 128 * 256


@pytest.mark.parametrize(("form", "supervised"), FORMS)
@pytest.mark.parametrize("stages", [(), (1,), (1, 3), (1, 2, 3)])
def test_outputs(stages, form, supervised):
    model = small(gated_transition=stages, transition_form=form, transition_supervision=supervised)
    maps = model(torch.randn(2, 3, 40, 64))
    assert [m.shape for m in maps] == [(2, 5, 10, 16)] * (1 + len(stages) * supervised)
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 33, 47)).shape == (1, 5, 9, 12)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_order_of_the_class_maps(form):
    model = small(gated_transition=(1, 2, 3), transition_form=form)
    with torch.no_grad():
        for stage in (1, 2, 3):
            predictor = (
                getattr(model, f"last_layer_stage{stage}")[3]
                if form == "released"
                else getattr(model, f"transition{stage}")[-1].transfer.predictor
            )
            predictor.weight.zero_()
            predictor.bias.fill_(stage)
        assert [m.unique().item() for m in model(torch.randn(2, 3, 64, 64))[1:]] == [3, 2, 1]


@pytest.mark.parametrize(("form", "supervised"), FORMS)
def test_gates_and_gradients(form, supervised):
    options = {"transition_form": form, "transition_supervision": supervised, "gated_transition": (1, 2, 3)}
    model = small(gated_fusion=False, gate_bias_init=4.0, **options)
    maps = model(torch.randn(2, 3, 64, 64))
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The convolutions in front of the heads' BatchNorm have a bias that BatchNorm's mean takes away again.
    assert [name for name in missing if not (name.startswith("last_layer") and name.endswith(".0.bias"))] == []
    with torch.no_grad(), record_gates(model.eval()) as gates:
        plain = model(torch.randn(2, 3, 64, 96))
    assert plain.shape == (2, 5, 16, 24)
    if form == "released":
        shapes = {"att1": (2, 1, 16, 24), "att2": (2, 1, 8, 12), "att3": (2, 1, 4, 6)}
    else:
        shapes = {f"transition{stage}.{stage}": (2, 1, 16, 24) for stage in (1, 2, 3)}
    assert {name: tuple(gate.shape) for name, gate in gates.items()} == shapes
    assert all(gate.min() > 0.9 for gate in gates.values())  # BatchNorm spreads a released-form logit around 4


@pytest.mark.parametrize("supervised", [True, False])
def test_a_closed_gate_of_the_paper_form_gives_a_constant_branch(supervised):
    # Nothing of the image passes: what is left of the projection is BatchNorm's shift.
    model = small(
        gated_transition=(1,), transition_form="paper", transition_supervision=supervised, gate_bias_init=-80.0
    )
    branches = []
    model.transition1[1].register_forward_hook(lambda module, inputs, output: branches.append(output[0]))
    with torch.no_grad():
        model.transition1[1].transfer.norm.bias.fill_(0.25)
        model.eval()(torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(branches[0], torch.full((1, 36, 8, 8), 0.25))


def test_keys():
    plain = set(small(gated_transition=()).state_dict())
    released = set(small(gated_transition=(1,), transition_supervision=False).state_dict())
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert released - plain == {"att1.1.0.0.weight", *(f"att1.1.0.1.{name}" for name in norm)}
    paper = set(small(gated_transition=(2,), transition_form="paper").state_dict())
    transfer = {"gate.weight", "predictor.weight", "predictor.bias", "projection.weight", *(f"norm.{n}" for n in norm)}
    assert paper - plain == {f"transition2.2.transfer.{name}" for name in transfer}
    assert {name.split(".")[0] for name in plain - paper} == {"transition2"}


def test_supervision_without_gates():
    plain = small(gated_fusion=False, gated_transition=())
    model = small(gated_fusion=False, gated_transition=(), auxiliary_supervision=(3, 2))
    assert model.options.auxiliary_supervision == (2, 3)
    found = model.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in found.missing_keys} == {"last_layer_stage2", "last_layer_stage3"}
    image = torch.randn(2, 3, 64, 64)
    assert [m.shape for m in model(image)] == [(2, 5, 16, 16)] * 3
    plain(image)  # one step of BatchNorm's statistics, as in the other one
    with torch.no_grad():
        assert torch.equal(model.eval()(image), plain.eval()(image))
    # In eval mode nothing reads the class maps, so they are not computed.
    assert complexity(model, (64, 64)).macs_as_defined == complexity(plain, (64, 64)).macs_as_defined


def test_auxiliary_supervision_beside_gated_transitions():
    supervised = small(gated_transition=(2, 3), auxiliary_supervision=(1, 2))
    assert len(supervised(torch.randn(2, 3, 32, 32))) == 4  # the map after stage 2 is there once
    unsupervised = small(gated_transition=(2, 3), transition_supervision=False, auxiliary_supervision=(1, 2))
    assert len(unsupervised(torch.randn(2, 3, 32, 32))) == 3
    literal = small(gated_transition=(2, 3), transition_form="paper", auxiliary_supervision=(2,))
    assert len(literal(torch.randn(2, 3, 32, 32))) == 3 and literal.last_layer_stage2 is None


@pytest.mark.parametrize("num_classes", [5, None])
def test_paper_form_compiles_without_graph_breaks(num_classes):
    torch._dynamo.reset()
    transition = TransitionTransfer(54, 72, num_classes, gate_bias_init=None).eval()
    levels = torch.randn(1, 54, 16, 24)
    with torch.no_grad():
        found = torch.compile(transition, fullgraph=True, backend="eager")(levels, (4, 6))
        torch.testing.assert_close(found, transition(levels, (4, 6)))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gated_transition": (0, 2)}, ValueError, r"gated_transition must be stages out of \(1, 2, 3\).*\(0, 2\)"),
        ({"auxiliary_supervision": (4,)}, ValueError, r"auxiliary_supervision must be stages out of \(1, 2, 3\)"),
        ({"auxiliary_supervision": True}, TypeError, "auxiliary_supervision must be a tuple of stages, got True"),
        ({"transition_form": "literal"}, ValueError, "transition_form must be one of .*paper.*'literal'"),
        ({"transition_supervision": None}, TypeError, "transition_supervision must be True or False"),
        ({"gate_bias_init": -1.0}, ValueError, "gate_bias_init must be at least 0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)
