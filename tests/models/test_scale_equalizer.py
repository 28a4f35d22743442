"""Scale equalizers: the measuring pass, the normalisation, the folding, and that the option off changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gsto_models import create_model, fold_scales, measure_scales
from gsto_models.blocks import concat_upsampled
from gsto_models.fused import plain_composition
from gsto_models.scale_equalizer import EqualizedConv2d

NETWORKS = [
    ("hrnetv2_w18_small_v2", {}, ["last_layer.0"]),
    ("gsto_hrnet_w18_small_v2", {}, ["last_layer_stage2.0", "last_layer_stage3.0", "last_layer.0"]),
    ("pspnet_r50", {"gate": "unsupervised", "output_stride": 16}, ["head.fusion.0"]),
    ("deeplabv3_r50", {"output_stride": 16}, ["head.fusion.0"]),
]
LEVELS = {"last_layer_stage2.0": [18, 36], "last_layer_stage3.0": [18, 36, 72], "last_layer.0": [18, 36, 72, 144]}


def build(name, **options):
    model = create_model(name, num_classes=3, scale_equalizer=True, **options)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.std() < 0.01:  # HRNet's first weights are tiny
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.double()


def images(count=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 48, 40, dtype=torch.float64, generator=generator) for _ in range(count)]


def fusion_inputs(model, batches):
    """What comes into every equalized convolution, batch after batch."""
    inputs = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: inputs.setdefault(name, []).append(args[0].clone()))
        for name, module in model.named_modules()
        if isinstance(module, EqualizedConv2d)
    ]
    with torch.no_grad(), plain_composition(model):
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return inputs


@pytest.mark.parametrize(("name", "options", "places"), NETWORKS)
def test_measured_scales_are_mean_and_deviation_over_all_batches(name, options, places):
    model = build(name, **options).train()
    twin = copy.deepcopy(model)
    batches = images()
    inputs = fusion_inputs(twin, batches)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    measure_scales(model, [(batches[0], "labels"), batches[1]])
    assert list(inputs) == places
    assert model.training
    for place, maps in inputs.items():
        conv = model.get_submodule(place)
        if place in LEVELS:
            assert list(conv.levels) == LEVELS[place]
        for level, x in enumerate(torch.cat(maps).split(list(conv.levels), 1)):
            torch.testing.assert_close(conv.level_mean[level], x.mean(), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(conv.level_std[level], x.std(correction=0), rtol=1e-9, atol=1e-12)
    after = model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {f"{p}.{b}" for p in places for b in ("level_mean", "level_std")}  # no running statistics


def test_levels_enter_the_fusion_with_mean_0_and_deviation_1():
    torch.manual_seed(3)
    levels = [4, 3]
    conv = EqualizedConv2d(levels, 7, 1).double()
    maps = [torch.randn(2, 4, 16, 16).double() * 5 + 2, torch.randn(2, 3, 4, 4).double() * 3 - 1]
    x = concat_upsampled(maps, align_corners=False)
    measure_scales(conv, [x])
    with torch.no_grad():
        conv.weight.copy_(torch.eye(7)[:, :, None, None])
        conv.bias.zero_()
        for y in conv(x).split(levels, 1):
            assert abs(y.mean()) < 1e-12 and abs(y.std(correction=0) - 1) < 1e-12
    assert conv.level_std[1] < 3 * 0.9  # upsampling has taken variance away


@pytest.mark.parametrize(("name", "options", "places"), NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_folding_keeps_the_outputs(name, options, places, training):
    model = build(name, **options)
    batches = images()
    identity = model.eval()(batches[0])
    measure_scales(model.train(), batches)
    assert not torch.allclose(model.eval()(batches[0]), identity, rtol=1e-3)  # the equalizers do something
    model.train(training)
    folded = copy.deepcopy(model)
    fold_scales(folded)
    plain = create_model(name, num_classes=3, **options).double().train(training)
    if "last_layer.0" in places:  # folded, its tensors are those of the network without equalizers
        assert {k: v.shape for k, v in folded.state_dict().items()} == {
            k: v.shape for k, v in plain.state_dict().items()
        }
    assert not any(isinstance(module, EqualizedConv2d) for module in folded.modules())
    for batch in batches:
        found, expected = folded(batch), model(batch)
        for f, e in zip(*((found, expected) if training else ([found], [expected])), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9 * e.abs().max().item())


def test_it_is_the_normalisation_of_its_levels():
    conv = EqualizedConv2d([2, 3], 4, 1).double()
    conv.level_mean.copy_(torch.tensor([1.5, -0.5]))
    conv.level_std.copy_(torch.tensor([2.0, 0.25]))
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    normal = torch.cat([(x[:, :2] - 1.5) / 2.0, (x[:, 2:] + 0.5) / 0.25], 1)
    found = conv(x)
    expected = F.conv2d(normal, conv.weight, conv.bias)
    torch.testing.assert_close(found, expected)
    for f, e in zip(
        torch.autograd.grad(found.square().sum(), (conv.weight, conv.bias)),
        torch.autograd.grad(expected.square().sum(), (conv.weight, conv.bias)),
        strict=True,
    ):
        torch.testing.assert_close(f, e)


def test_identity_before_measuring():
    torch.manual_seed(5)
    equalized = create_model("gsto_hrnet_w18_small_v2", num_classes=3, scale_equalizer=True).eval()
    torch.manual_seed(5)
    plain = create_model("gsto_hrnet_w18_small_v2", num_classes=3).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(equalized(image), plain(image))
    assert type(plain.last_layer[0]) is nn.Conv2d
    missing, unexpected = equalized.load_state_dict(plain.state_dict(), strict=False)
    assert all("level_" in key for key in missing) and len(missing) == 6 and unexpected == []


def test_bad_use_is_named():
    with pytest.raises(ValueError, match="scale_equalizer"):
        measure_scales(create_model("hrnetv2_w18_small_v2"), images(1))
    with pytest.raises(ValueError, match="scale_equalizer"):
        fold_scales(create_model("hrnetv2_w18_small_v2"))
    with pytest.raises(ValueError, match="multi_scale_output"):
        create_model("hrnetv2_w18_small_v2", scale_equalizer=True, multi_scale_output=False)
    with pytest.raises(TypeError, match="scale_equalizer"):
        create_model("hrnetv2_w18_small_v2", scale_equalizer=1)
    conv = nn.Sequential(EqualizedConv2d([1, 2], 3, 1))
    with pytest.raises(ValueError, match="batches must contain"):
        measure_scales(conv, [])
    x = torch.randn(1, 3, 4, 4)
    x[:, 1:] = 2.0
    with pytest.raises(ValueError, match="level 1 of 0 has mean 2"):
        measure_scales(conv, [x])
    with pytest.raises(ValueError, match="level 0 of 0 has mean nan"):
        measure_scales(conv, [torch.full((1, 3, 4, 4), float("nan"))])
    assert torch.equal(conv[0].level_std, torch.ones(2))
