"""``gsto_ops.convert``: what is replaced in other people's networks, and that the output stays where it should."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gsto_ops import GatedScaleTransfer, convert


def conv_norm_relu(in_channels, out_channels, kernel_size):
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Down by max pooling; up by 1x1 conv + norm + ReLU + interpolation, then a plain nn.Upsample used twice."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([conv_norm_relu(3, 8, 3), conv_norm_relu(8, 16, 3), conv_norm_relu(16, 32, 3)])
        self.deepest = conv_norm_relu(32, 32, 3)
        self.pool = nn.MaxPool2d(2)
        self.narrow = conv_norm_relu(32, 16, 1)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.fuse = nn.ModuleList(
            [conv_norm_relu(16 + 32, 24, 3), conv_norm_relu(24 + 16, 20, 3), conv_norm_relu(28, 8, 3)]
        )
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, image):
        skips = []
        x = image
        for block in self.down:
            skips.append(block(x))
            x = self.pool(skips[-1])
        x = self.narrow(self.deepest(x))
        x = F.interpolate(x, size=skips[2].shape[-2:], mode="bilinear", align_corners=True)
        x = self.fuse[0](torch.cat([x, skips[2]], 1))
        x = self.fuse[1](torch.cat([self.up(x), skips[1]], dim=1))
        x = self.fuse[2](torch.cat([self.up(x), skips[0]], dim=1))
        return F.interpolate(self.head(x), scale_factor=2, mode="bilinear")


class FPN(nn.Module):
    """Laterals are read twice, by the top-down path and by the output convolutions."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in ((3, 8), (8, 16), (16, 32))
        )
        self.laterals = nn.ModuleList(nn.Conv2d(c, 12, 1) for c in (8, 16, 32))
        self.outputs = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))

    def forward(self, x):
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        maps = [lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)]
        for level in (1, 0):
            maps[level] = maps[level] + F.interpolate(maps[level + 1], size=maps[level].shape[2:], mode="nearest")
        return [output(x) for output, x in zip(self.outputs, maps, strict=True)]


class PyramidPooling(nn.Module):
    """PSPNet's module, with the names of pooling as a layer (bin 1) and as a function (bin 3)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.one = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm_relu(16, 4, 1))
        self.three = conv_norm_relu(16, 4, 1)
        self.head = nn.Conv2d(24, 5, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        size = x.shape[-2:]
        levels = [self.one(x), self.three(F.adaptive_avg_pool2d(x, 3))]
        return self.head(torch.cat([x, *(F.interpolate(y, size, mode="bilinear") for y in levels)], 1))


NETWORKS = {
    UNet: ["gated_narrow_0", "gated_up", "gated_up_1"],
    FPN: ["gated_interpolate", "gated_interpolate_1"],
    PyramidPooling: ["gated_one_0", "gated_adaptive_avg_pool2d"],
}


def trained(network):
    """Fresh weights, but statistics of real batches, and biases that are not zero."""
    model = network()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    with torch.no_grad():
        for _ in range(5):
            model(image())
    return model


def image():
    return torch.randn(2, 3, 40, 56)


def maps(output):
    return output if isinstance(output, list) else [output]


def gates_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, GatedScaleTransfer)}


@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_replaced(network):
    model, report = convert(network())
    assert list(report.replaced) == NETWORKS[network] == list(gates_of(model))
    assert f"{len(NETWORKS[network])} scale transfers gated" in str(report)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_output_is_preserved(network, training):
    original = trained(network).double().train(training)
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    converted, _ = convert(original, preserve_output=True)
    assert converted.training == training
    x = image().double()
    for found, expected in zip(maps(converted(x)), maps(original.train(training)(x)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if not training:
        assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def half_open(original):
    """The converted network with every gate at one half."""
    converted, _ = convert(original, gate_bias_init=None)
    for gated in gates_of(converted).values():
        nn.init.zeros_(gated.gate.weight)
    return converted


@pytest.mark.parametrize(
    ("network", "gated"), [(UNet, ["narrow.0", "up"]), (PyramidPooling, ["one.0", "three.0"])], ids=["UNet", "PSP"]
)
def test_gates_are_where_the_transfers_are(network, gated):
    original = trained(network).double().eval()
    converted = half_open(original)
    for name in gated:  # a mean of halves is half of the mean, so the pooled map may be halved as well
        original.get_submodule(name).register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    x = image().double()
    torch.testing.assert_close(converted(x), original(x), rtol=1e-12, atol=1e-12)


def test_gates_are_in_the_top_down_path():
    original = trained(FPN).double().eval()
    x = level = image().double()
    features = [level := stage(level) for stage in original.stages]
    fine, middle, coarse = (lateral(feature) for lateral, feature in zip(original.laterals, features, strict=True))
    middle = middle + F.interpolate(coarse, middle.shape[2:]) / 2
    fine = fine + F.interpolate(middle, fine.shape[2:]) / 2
    expected = [output(y) for output, y in zip(original.outputs, (fine, middle, coarse), strict=True)]
    for found, wanted in zip(half_open(original)(x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("preserve_output", [False, True])
def test_gates_learn(preserve_output):
    model, _ = convert(trained(UNet), preserve_output=preserve_output)
    before = {name: gated.gate.weight.clone() for name, gated in gates_of(model).items()}
    assert all((weight == 0).all() == preserve_output for weight in before.values())
    assert all(gated.gate.bias.item() == 4.0 for gated in gates_of(model).values())
    model(image()).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert all((gated.gate.weight != before[name]).any() for name, gated in gates_of(model).items())


def test_weights_and_names_go_on():
    original = trained(UNet)
    converted, _ = convert(original)
    old, new = original.state_dict(), converted.state_dict()
    kept = {name for name in old if not name.startswith("narrow.")}
    assert all(torch.equal(old[name], new[name]) for name in kept)
    assert torch.equal(new["gated_narrow_0.projection.weight"], old["narrow.0.weight"])
    assert torch.equal(new["gated_narrow_0.norm.running_var"], old["narrow.1.running_var"])
    added = {name for name in new if name not in old}
    assert {name.split(".", 1)[1] for name in added if ".gate." in name} == {"gate.weight", "gate.bias"}
    converted.gated_narrow_0.projection.weight.data.zero_()
    assert torch.equal(original.state_dict()["narrow.0.weight"], old["narrow.0.weight"])


def test_mode_dtype_and_frozen_norms_are_kept():
    model = UNet().double()
    model.narrow[1].eval()
    converted, _ = convert(model)
    gated = converted.gated_narrow_0
    assert gated.training and not gated.norm.training and gated.gate.weight.dtype == torch.float64
    assert not convert(model.eval())[0].gated_up.training


class Block(nn.Module):
    def __init__(self, *layers, then=None):
        super().__init__()
        self.layers, self.last = nn.Sequential(*layers), nn.Conv2d(4, 4, 3)
        self.then = then

    def forward(self, x):
        x = self.layers(x)
        return self.last(x if self.then is None else self.then(x))


def narrowing(**options):
    return Block(nn.Conv2d(3, 4, 1), nn.Upsample(**options))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (narrowing(scale_factor=2, mode="bicubic"), "mode='bicubic' is none of 'bilinear'"),
        (narrowing(scale_factor=2, recompute_scale_factor=True), "recompute_scale_factor=True"),
        (
            Block(nn.Conv2d(3, 4, 1), then=lambda x: F.interpolate(x, 8, mode="bilinear", antialias=True)),
            "antialias=True",
        ),
        (
            Block(nn.Conv2d(3, 4, 1), then=lambda x: F.interpolate(x, scale_factor=x.shape[2] / 8)),
            "computed in forward",
        ),
        (Block(then=lambda x: torch.cat([F.interpolate(x, 8), x[:, :1]], 1)), "channels is not known"),
        (Block(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2)), "fixed windows"),
        (Block(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(5)), "not for a 1x1 convolution"),
        (Block(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((None, 5)), nn.Conv2d(4, 4, 1)), "leaves a side as it is"),
        (Block(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Sigmoid()), "not interpolated again"),
        (nn.Sequential(nn.Conv2d(3, 5, 1), nn.Upsample(scale_factor=4)), "what the network, or a part"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_stays_and_why(model, reason):
    converted, report = convert(model)
    assert not report.replaced and not gates_of(converted)
    assert len(report.kept) == 1 and reason in str(report)


def test_the_bins_of_a_pyramid_have_one_gate_each():
    _, report = convert(PyramidPooling())
    assert list(report.kept.values()) == ["it brings back what a gated pooling made"] * 2


def test_output_can_be_gated_too():
    model, report = convert(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Upsample(scale_factor=4)), gate_output=True)
    assert list(report.replaced.values()) == ["Conv2d + nearest interpolation, C=3"]
    assert model(image()).shape == (2, 5, 160, 224)


@pytest.mark.parametrize("channels", [4, 3])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
@pytest.mark.parametrize("relu", [nn.ReLU(), nn.Identity()])
def test_projections_of_every_make(channels, norm, relu):
    layers = [nn.Conv2d(3, channels, 1), norm(channels), relu]
    layers = [layer for layer in layers if not isinstance(layer, nn.Identity)]
    up = nn.UpsamplingBilinear2d(scale_factor=2)  # align_corners=True
    model = nn.Sequential(*layers, up, nn.Conv2d(channels, 2, 3)).double()
    converted, report = convert(model, preserve_output=True)
    (gated,) = gates_of(converted).values()
    assert gated.projection is converted.get_submodule(next(iter(report.replaced))).projection is not None
    x = image().double()
    torch.testing.assert_close(converted(x), model(x), rtol=1e-12, atol=1e-12)


def test_shared_convolution_is_not_taken_apart():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduce, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            return self.last(F.interpolate(self.reduce(x), size=20) + F.interpolate(self.reduce(x[..., ::2]), size=20))

    model = Shared().double()
    converted, report = convert(model, preserve_output=True)
    assert len(report.replaced) == 2 and all(gated.projection is None for gated in gates_of(converted).values())
    x = image().double()
    torch.testing.assert_close(converted(x), model(x), rtol=1e-12, atol=1e-12)


class Branching(nn.Module):
    """Cannot be traced: its way depends on the values of its input. Parts of it can."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([narrowing(scale_factor=2)])
        self.optional = WithDefault()

    def forward(self, x):
        return self.optional(self.blocks[0](x)) if x.sum() > 0 else x


class WithDefault(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = narrowing(scale_factor=2)

    def forward(self, x, skip=None):
        return x if skip is None else self.inner(skip)


def test_parts_are_converted_where_the_whole_cannot_be_traced():
    model, report = convert(Branching())
    assert type(model) is Branching
    assert list(report.replaced) == ["blocks.0.gated_layers_0", "optional.inner.gated_layers_0"]
    assert list(report.kept) == ["Branching", "optional"]
    assert "symbolically traced" in report.kept["Branching"] and "optional arguments" in report.kept["optional"]
    assert model(torch.ones(1, 3, 8, 8)).shape == (1, 4, 14, 14)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": print}, TypeError, "model must be a torch.nn.Module, got builtin"),
        ({"gate_bias_init": "open"}, TypeError, "gate_bias_init must be a number or None"),
        ({"gate_bias_init": float("inf")}, ValueError, "gate_bias_init must be finite"),
        ({"preserve_output": 1}, TypeError, "preserve_output must be True or False"),
        ({"gate_output": None}, TypeError, "gate_output must be True or False"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        convert(**{"model": UNet(), **arguments})


def test_compiles():
    original = trained(UNet).eval()
    model = torch.compile(convert(original, preserve_output=True)[0], backend="eager", fullgraph=True)
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x))


def check_foreign(original, least):
    original.double().eval()
    converted, report = convert(original, preserve_output=True)
    assert len(report.replaced) >= least, str(report)
    x = torch.randn(1, 3, 64, 64).double()
    with torch.no_grad():
        for found, expected in zip(maps(converted(x)), maps(original(x)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_timm():
    timm = pytest.importorskip("timm", reason="the package timm cannot be imported", exc_type=Exception)
    check_foreign(timm.create_model("hrnet_w18_small_v2", pretrained=False, features_only=True), 22)


@pytest.mark.parametrize(("name", "least"), [("Unet", 5), ("FPN", 9), ("PSPNet", 4), ("DeepLabV3", 1)])
def test_segmentation_models_pytorch(name, least):
    reason = "the package segmentation_models_pytorch cannot be imported"
    networks = pytest.importorskip("segmentation_models_pytorch", reason=reason, exc_type=Exception)
    check_foreign(getattr(networks, name)("resnet18", encoder_weights=None, classes=4), least)
