"""The ResNet-50 backbone: torchvision's names and counts, and dilation instead of strides; the networks on it."""

import pytest
import torch

from gsto_models import complexity, create_model
from gsto_models.resnet import ResNet50

NAMES = ["pspnet_r50", "deeplabv3_r50", "rsp_r50"]
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def scramble(model):
    """BatchNorm statistics that are not the identity, and blocks that keep activations of order one."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0).mul_(0.3 if name.endswith("bn3") else 1.0)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def torchvision_keys():
    keys = {"conv1.weight"} | {f"bn1.{n}" for n in BN}
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for b in range(blocks):
            for k in (1, 2, 3):
                keys |= {f"layer{layer}.{b}.conv{k}.weight"} | {f"layer{layer}.{b}.bn{k}.{n}" for n in BN}
        keys |= {f"layer{layer}.0.downsample.0.weight"} | {f"layer{layer}.0.downsample.1.{n}" for n in BN}
    return keys


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_keys_shapes_and_count_are_those_of_torchvision(output_stride):
    model = ResNet50(output_stride)
    state = model.state_dict()
    assert set(state) == torchvision_keys()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032 - 1000 * (2048 + 1)  # without the classifier fc
    assert state["layer3.0.conv1.weight"].shape == (256, 512, 1, 1)
    assert state["layer4.0.downsample.0.weight"].shape == (2048, 1024, 1, 1)


def test_multiply_adds_are_those_of_the_published_network():
    class Trunk(ResNet50):
        def forward(self, input):
            return super().forward(input)[-1]

    # 4.089 G multiply-adds at 224x224 (torchvision's table), the classifier's 2.048 M not included
    assert complexity(Trunk(), (224, 224)).macs_as_defined == 4_089_184_256 - 2_048_000


@pytest.mark.parametrize("size", [(64, 96), (67, 101)])
def test_dilated_network_subsampled_is_the_network_with_strides(size):
    strided = scramble(ResNet50(32).double()).eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = strided(image)
        for output_stride, steps in ((8, (1, 1, 2, 4)), (16, (1, 1, 1, 2))):
            dilated = ResNet50(output_stride).double().eval()
            dilated.load_state_dict(strided.state_dict())
            found = dilated(image)
            for f, e, step in zip(found, expected, steps, strict=True):
                torch.testing.assert_close(f[:, :, ::step, ::step], e, rtol=1e-9, atol=1e-9)
            assert found[-1].shape == (2, 2048, *(-(-n // output_stride) for n in size))
            assert found[-1].std() > 0.01


def test_bad_output_stride():
    with pytest.raises(ValueError, match=r"output_stride must be one of \(8, 16, 32\), got 4"):
        ResNet50(4)


@pytest.mark.parametrize("name", NAMES)
def test_networks_reject_bad_input(name):
    model = create_model(name, num_classes=3).eval()
    for shape in ((3, 64, 64), (1, 4, 64, 64), (1, 3, 31, 64)):
        with pytest.raises(ValueError, match="input must be"):
            model(torch.zeros(shape))
    with pytest.raises(TypeError, match="input must be floating point"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="task"):
        create_model(name, task="pose")
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        create_model(name, num_classes=0)
    with pytest.raises(TypeError, match="num_classes must be an integer"):
        create_model(name, num_classes=3.0)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("pspnet_r50", {"gate": "paper"}, ValueError),
        ("pspnet_r50", {"output_stride": 32}, ValueError),
        ("pspnet_r50", {"auxiliary": 1}, TypeError),
        ("deeplabv3_r50", {"gate_bias_init": "4"}, TypeError),
        ("deeplabv3_r50", {"gate_bias_init": float("nan")}, ValueError),
        ("deeplabv3_r50", {"bn_momentum": 0}, ValueError),
        ("deeplabv3_r50", {"gate_form": "paper"}, TypeError),
        ("rsp_r50", {"region_size": 4}, ValueError),
        ("rsp_r50", {"region_size": "5"}, TypeError),
        ("rsp_r50", {"bn_momentum": 2.0}, ValueError),
    ],
)
def test_bad_options_are_named(name, options, error):
    with pytest.raises(error, match=next(iter(options))):
        create_model(name, **options)


def test_bn_momentum():
    for momentum, options in ((0.01, {}), (0.2, {"bn_momentum": 0.2})):
        model = create_model("pspnet_r50", num_classes=2, **options)
        assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {momentum}


@pytest.mark.parametrize(("name", "gate"), [("pspnet_r50", "supervised"), ("deeplabv3_r50", "unsupervised")])
def test_heads_compile_without_graph_breaks(name, gate):
    torch._dynamo.reset()
    head = create_model(name, num_classes=3, gate=gate, scale_equalizer=True).head.eval()
    feature = torch.randn(1, 2048, 5, 6)
    with torch.no_grad():
        found = torch.compile(head, fullgraph=True, backend="eager")(feature)
        torch.testing.assert_close(found, head(feature))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_layouts_autocast_and_empty_batch(name):
    options = {} if name == "rsp_r50" else {"gate": "supervised", "output_stride": 16}
    model = create_model(name, num_classes=3, **options)
    images = torch.randn(2, 3, 48, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = model(images)
    assert all(m.dtype == torch.bfloat16 and m.isfinite().all() for m in maps)
    sum(m.float().square().sum() for m in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model, images = scramble(model).double().eval(), images.double()
    with torch.no_grad():
        expected = model(images)
        assert model(images[:0]).shape == (0, *expected.shape[1:])
        found = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
