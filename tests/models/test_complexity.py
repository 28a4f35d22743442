"""Parameters and multiply-adds against the tables of the paper, recomputed to the last parameter."""

import pytest
import torch
from torch import nn

import gsto_ops
from gsto_models import complexity, create_model, set_fused

CITYSCAPES = (1024, 2048)

ROWS = [
    ("hrnetv2_w18_small_v2", {}, 3_923_091, 71.579),
    ("hrnetv2_w18_small_v2", {"gated_fusion": True}, 3_926_493, 71.653),
    ("gsto_hrnet_w18_small_v2", {"gated_transition": (3,)}, 3_945_097, 73.904),
    ("gsto_hrnet_w18_small_v2", {}, 3_949_292, 74.407),
    ("gsto_hrnet_w18_small_v2", {"gate_form": "released"}, 3_949_292, 74.407),
    ("hrnetv2_w48", {}, 65_773_843, 696.176),
    ("gsto_hrnet_w48", {}, 65_930_442, 713.916),
]


@pytest.mark.parametrize(("name", "options", "conv_params", "gflops"), ROWS)
def test_segmentation_tables_of_the_paper(name, options, conv_params, gflops):
    model = create_model(name, num_classes=19, **options)
    cost = complexity(model, CITYSCAPES)
    assert cost.conv_params == conv_params
    assert cost.gflops == pytest.approx(gflops, abs=5.1e-4)
    assert cost.params == sum(p.numel() for p in model.parameters())
    # Fusion projects before it upsamples, as the paper does. What is saved: heads and predictors take every branch at its own
    # resolution, 1/4, 1/16 and 1/64 of the pixels of the first one.
    width = model.stage2[0].branches[0][0].conv1.out_channels
    levels = [4, *(stage for stage in (2, 3) if stage in model.options.gated_transition)]
    saved = 0
    for count in levels:
        channels = [width * 2**k for k in range(count)]
        saved += sum(channels) * sum(c - c / 4**k for k, c in enumerate(channels)) * 256 * 512
    assert cost.macs_as_defined - cost.macs_as_executed == pytest.approx(saved, rel=1e-12)


def hooked_macs(model, image):
    """An independent count: the output sizes of the Conv2d modules that really run."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    set_fused(model, False)  # so that every convolution runs as its module
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    model.eval()(image)
    for handle in handles:
        handle.remove()
    return total


def test_agrees_with_hooks_at_an_odd_size():
    # In the released form every convolution is a module call, so that hooks see them all.
    model = create_model("gsto_hrnet_w18_small_v2", gate_form="released")
    assert complexity(model, (67, 93)).macs_as_defined == hooked_macs(model, torch.randn(1, 3, 67, 93))


@pytest.mark.parametrize("backend", gsto_ops.available_backends())
def test_every_backend_counts_the_same(backend):
    model = create_model("gsto_hrnet_w18_small_v2", num_classes=19)
    with gsto_ops.use_backend(backend):
        assert complexity(model, CITYSCAPES).gflops == pytest.approx(74.407, abs=5.1e-4)
    assert model.training and all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())


def test_fused_operator_and_transposed_convolution_are_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Conv2d(3, 1, 1)
            self.projection = nn.Conv2d(3, 5, 1, bias=False)
            self.up = nn.ConvTranspose2d(5, 2, 4, stride=2, padding=1)

        def forward(self, x):
            size = (x.shape[2] // 4, x.shape[3] // 4)
            scale = (None, None)
            operands = (x, self.gate.weight, self.gate.bias, self.projection.weight, None)
            y, _ = torch.ops.gsto_ops.gated_scale_transfer(*operands, "none", size, "avg", False, *scale)
            return self.up(y)

    cost = complexity(Net(), (16, 32))
    up = 5 * 4 * 8 * 2 * 4 * 4
    assert cost.macs_as_defined == 3 * 16 * 32 + 3 * 5 * 16 * 32 + up
    assert cost.macs_as_executed == 3 * 16 * 32 + 3 * 5 * 4 * 8 + up
    assert (cost.params, cost.conv_params) == (4 + 15 + 162, 4 + 15 + 162)


def test_text_and_errors():
    model = create_model("hrnetv2_w18_small_v2")
    text = str(complexity(model, CITYSCAPES))
    assert "3,923,091" in text and "71.579" in text and "76,856,885,248" in text
    for size in [(64,), (0, 64), (64.0, 64), (1, 3, 64, 64)]:
        with pytest.raises(ValueError, match="input_size"):
            complexity(model, size)
    with pytest.raises(ValueError, match="H, W >= 32"):
        complexity(model, (16, 64))


@pytest.mark.parametrize("bias", [False, True])
def test_a_class_map_is_counted_in_either_layout(bias):
    """On a CPU it is an operator of its own, elsewhere a convolution."""

    class Net(nn.Module):
        def __init__(self, memory_format):
            super().__init__()
            self.memory_format = memory_format
            self.predictor, self.gate = nn.Conv2d(3, 7, 1, bias=bias), nn.Conv2d(7, 1, 1, bias=False)

        def forward(self, x):
            x = x.contiguous(memory_format=self.memory_format)
            predictor, gate = (self.predictor.weight, self.predictor.bias), self.gate.weight
            return gsto_ops.supervised_gated_scale_transfer(x, *predictor, gate, size=(4, 8))[0]

    nchw, nhwc = (complexity(Net(f), (16, 32)) for f in (torch.contiguous_format, torch.channels_last))
    assert nchw.macs_as_executed == nhwc.macs_as_executed >= 7 * 3 * 16 * 32
