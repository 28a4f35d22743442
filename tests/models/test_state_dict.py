"""Names: of models, options and, above all, of tensors, which are those of the published checkpoints."""

import pytest
import torch

from gsto_models import create_model, list_models

CONV = ("weight",)
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def group(prefix, names):
    return {f"{prefix}.{name}" for name in names}


def conv_bn(prefix, conv="0", bn="1"):
    return group(f"{prefix}.{conv}", CONV) | group(f"{prefix}.{bn}", BN)


def head(prefix):
    return (
        group(f"{prefix}.0", ("weight", "bias")) | group(f"{prefix}.1", BN) | group(f"{prefix}.3", ("weight", "bias"))
    )


def hrnet_keys(stage1_blocks, modules, blocks):
    keys = group("conv1", CONV) | group("bn1", BN) | group("conv2", CONV) | group("bn2", BN) | head("last_layer")
    for b in range(stage1_blocks):
        for k in (1, 2, 3):
            keys |= conv_bn(f"layer1.{b}", f"conv{k}", f"bn{k}")
    keys |= conv_bn("layer1.0.downsample")
    keys |= (
        conv_bn("transition1.0") | conv_bn("transition1.1.0") | conv_bn("transition2.2.0") | conv_bn("transition3.3.0")
    )
    for stage, m, i in targets(modules):
        for b in range(blocks):
            for k in (1, 2):
                keys |= conv_bn(f"stage{stage}.{m}.branches.{i}.{b}", f"conv{k}", f"bn{k}")
        for j in range(stage):
            pair = f"stage{stage}.{m}.fuse_layers.{i}.{j}"
            if j > i:
                keys |= conv_bn(pair)
            for k in range(i - j):
                keys |= conv_bn(f"{pair}.{k}")
    return keys


def targets(modules):
    return [(s, m, i) for s, count in zip((2, 3, 4), modules, strict=True) for m in range(count) for i in range(s)]


def gate_keys(modules, names):
    return {f"stage{s}.{m}.att_layers.{i}.{j}.{n}" for s, m, i in targets(modules) for j in range(s) for n in names}


def transition_keys():
    keys = head("last_layer_stage2") | head("last_layer_stage3")
    for k in range(2):
        keys |= conv_bn(f"att2.2.{k}")
    for k in range(3):
        keys |= conv_bn(f"att3.3.{k}")
    return keys


RELEASED = ["0.weight", *(f"1.{name}" for name in BN)]
SMALL, LARGE = (2, (1, 3, 2), 2), (4, (1, 4, 3), 4)


@pytest.mark.parametrize(
    ("name", "options", "trunk", "gates"),
    [
        ("gsto_hrnet_w18_small_v2", {}, SMALL, ["0.weight"]),
        ("gsto_hrnet_w18_small_v2", {"gate_bias_init": 4}, SMALL, ["0.weight", "0.bias"]),
        ("gsto_hrnet_w18_small_v2", {"gate_form": "released"}, SMALL, RELEASED),
        ("gsto_hrnet_w18_small_v2", {"gate_form": "released", "gate_bias_init": 4.0}, SMALL, RELEASED),
        ("gsto_hrnet_w18", {}, LARGE, ["0.weight"]),
    ],
)
def test_keys_of_gsto_hrnet(name, options, trunk, gates):
    expected = hrnet_keys(*trunk) | gate_keys(trunk[1], gates) | transition_keys()
    assert set(create_model(name, **options).state_dict()) == expected


@pytest.mark.parametrize(("name", "trunk"), [("hrnetv2_w18_small_v2", SMALL), ("hrnetv2_w18", LARGE)])
def test_keys_of_hrnetv2(name, trunk):
    assert set(create_model(name).state_dict()) == hrnet_keys(*trunk)


@pytest.mark.parametrize(("stages", "present"), [((), set()), ((2,), {"2"}), ([3], {"3"}), ({3, 2}, {"2", "3"})])
def test_gated_transition_chooses_the_stages(stages, present):
    keys = set(create_model("gsto_hrnet_w18_small_v2", gated_transition=stages).state_dict())
    for stage in "23":
        prefixes = (f"att{stage}.", f"last_layer_stage{stage}.")
        assert any(key.startswith(prefixes) for key in keys) == (stage in present)


def test_shapes_that_published_checkpoints_have():
    shapes = {k: tuple(v.shape) for k, v in create_model("gsto_hrnet_w48", gate_form="released").state_dict().items()}
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["transition2.2.0.0.weight"] == (192, 96, 3, 3)
    assert shapes["stage4.2.fuse_layers.0.3.0.weight"] == (48, 384, 1, 1)
    assert shapes["stage4.2.fuse_layers.3.0.1.0.weight"] == (48, 48, 3, 3)
    assert shapes["stage4.2.fuse_layers.3.0.2.0.weight"] == (384, 48, 3, 3)
    assert shapes["stage4.2.att_layers.0.3.0.weight"] == (1, 384, 1, 1)
    assert shapes["att3.3.0.0.weight"] == (1, 19, 3, 3)
    assert shapes["att3.3.2.0.weight"] == (1, 1, 3, 3)
    assert shapes["last_layer_stage3.0.weight"] == (336, 336, 1, 1)
    assert shapes["last_layer.3.weight"] == (19, 720, 1, 1)


def test_list_models():
    sizes = ("w18_small_v2", "w18", "w32", "w48")
    assert {f"{family}_{size}" for family in ("hrnetv2", "gsto_hrnet") for size in sizes} <= set(list_models())
    assert len(set(list_models())) == len(list_models())


def test_unknown_name_lists_near_matches_and_all():
    with pytest.raises(ValueError, match="did you mean gsto_hrnet_w48") as error:
        create_model("gsto_hrnet_w_48")
    assert all(name in str(error.value) for name in list_models())


def test_unknown_option_lists_the_allowed_ones():
    with pytest.raises(TypeError, match="unknown option gate_from") as error:
        create_model("gsto_hrnet_w48", gate_from="paper")
    for name in ("gated_fusion", "gated_transition", "gate_form", "gate_bias_init", "bn_momentum", "align_corners"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "depth"}, ValueError, "task must be one of .*segmentation.*pose.*'depth'"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 19.0}, TypeError, "num_classes"),
        ({"gated_fusion": 1}, TypeError, "gated_fusion"),
        ({"gated_transition": (2, 4)}, ValueError, r"gated_transition must be stages out of \(1, 2, 3\).*\(2, 4\)"),
        ({"gated_transition": (2, 2)}, ValueError, "gated_transition"),
        ({"gated_transition": 2}, TypeError, "gated_transition"),
        ({"gated_transition": "23"}, TypeError, "gated_transition"),
        ({"gated_transition": (2, "3")}, ValueError, "gated_transition"),
        ({"gate_form": "plain"}, ValueError, "gate_form must be one of .*paper.*released.*'plain'"),
        ({"gate_bias_init": "open"}, TypeError, "gate_bias_init"),
        ({"gate_bias_init": float("nan")}, ValueError, "gate_bias_init must be finite"),
        ({"gate_bias_init": -1.0}, ValueError, "gate_bias_init must be at least 0"),
        ({"bn_momentum": 0.0}, ValueError, r"bn_momentum must be in \(0, 1\]"),
        ({"bn_momentum": True}, TypeError, "bn_momentum"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        create_model("gsto_hrnet_w18_small_v2", **arguments)


def test_initialisation():
    model = create_model("gsto_hrnet_w18", bn_momentum=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.momentum == 0.01
            assert (module.weight == 1).all() and (module.bias == 0).all()
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, torch.nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.001, rel=0.01)
    assert abs(weights.mean().item()) < 1e-5
    model = create_model("hrnetv2_w18_small_v2", bn_momentum=0.1)
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}
