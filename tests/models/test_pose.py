"""Pose networks: GSTO-HRNet and plain HRNet with heatmaps, against the paper's tables and the published key layout."""

import pytest
import torch
from torch import nn

from gsto_models import complexity, create_model, list_models

COCO = (384, 288)


@pytest.mark.parametrize(
    ("name", "millions", "gflops"), [("gsto_hrnet_w32", 29.6207, 18.164), ("gsto_hrnet_w48", 66.0148, 37.632)]
)
def test_gsto_hrnet_rows_of_the_paper(name, millions, gflops):
    # The published networks have a gate after stage 1, att1, that nothing uses; the paper's parameters include it.
    released = {"task": "pose", "gate_form": "released"}
    cost = complexity(create_model(name, **released), COCO)
    unused = create_model("gsto_hrnet_w18_small_v2", gated_transition=(1,), **released).att1  # of any width: it reads P
    extra = sum(p.numel() for p in unused.parameters())
    assert extra == 17 * 9 + 2  # a 3x3 convolution 17 -> 1 and its BatchNorm
    assert (cost.params + extra) / 1e6 == pytest.approx(millions, abs=5e-5)
    assert cost.gflops == pytest.approx(gflops, abs=5e-4)


@pytest.mark.parametrize(("name", "millions", "gflops"), [("hrnet_w32", "28.5", "16.0"), ("hrnet_w48", "63.6", "32.9")])
def test_plain_hrnet_rows_of_the_paper(name, millions, gflops):
    cost = complexity(create_model(name, task="pose"), COCO)
    assert f"{cost.params / 1e6:.1f}" == millions
    assert f"{cost.gflops:.1f}" == gflops


def test_plain_hrnet_has_one_output_branch_and_a_single_convolution_as_its_head():
    shapes = {name: tuple(tensor.shape) for name, tensor in create_model("hrnet_w32").state_dict().items()}
    assert shapes["final_layer.weight"] == (17, 32, 1, 1) and shapes["final_layer.bias"] == (17,)
    assert shapes["stage4.2.fuse_layers.0.3.0.weight"] == (32, 256, 1, 1)
    assert not [name for name in shapes if name.startswith(("stage4.2.fuse_layers.1", "last_layer", "final_layer.0"))]
    assert any(name.startswith("stage4.1.fuse_layers.3.") for name in shapes)  # the other modules have all outputs
    assert not [name for name in shapes if "att" in name]
    assert len({name.split(".fuse_layers.")[0] for name in shapes if ".fuse_layers." in name}) == 1 + 4 + 3


def test_head_key_and_the_rest_of_gsto_hrnet():
    pose = set(create_model("gsto_hrnet_w18_small_v2", task="pose", num_classes=17).state_dict())
    segmentation = set(create_model("gsto_hrnet_w18_small_v2", num_classes=17).state_dict())
    renamed = {name.replace("last_layer.", "final_layer.") for name in segmentation}
    assert pose == renamed and "final_layer.3.weight" in pose and "last_layer_stage2.3.weight" in pose


def test_heatmaps():
    model = create_model("gsto_hrnet_w18_small_v2", task="pose")
    assert [m.shape for m in model(torch.randn(2, 3, 96, 72))] == [(2, 17, 24, 18)] * 3
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 384, 288)).shape == (1, 17, 96, 72)
    model = create_model("hrnet_w32", num_classes=5)
    assert [m.shape for m in model(torch.randn(2, 3, 67, 50))] == [(2, 5, 17, 13)]


def test_initialisation():
    model = create_model("gsto_hrnet_w18", task="pose")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for m in norms} == {0.1} and all((m.weight == 1).all() for m in norms)
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.001, rel=0.01)
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)


def test_training_steps_lower_the_loss():
    model = create_model("gsto_hrnet_w18_small_v2", task="pose", num_classes=3, gate_bias_init=4.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    image = torch.randn(2, 3, 64, 48)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(12.0), indexing="ij")
    center = torch.tensor([[4.0, 3.0], [8.0, 6.0], [11.0, 9.0]])
    target = torch.stack([torch.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 8) for cy, cx in center])
    losses = []
    for _ in range(12):
        maps = zip((1, 0.5, 0.3), model(image), strict=True)
        loss = sum(weight * nn.functional.mse_loss(m, target.expand_as(m)) for weight, m in maps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_names_and_tasks():
    assert "hrnet_w32" in list_models("pose") and "hrnet_w32" not in list_models("segmentation")
    assert "gsto_hrnet_w48" in list_models("pose") and "gsto_hrnet_w48" in list_models("segmentation")
    assert set(list_models()) == set(list_models("pose")) | set(list_models("segmentation"))
    with pytest.raises(ValueError, match=r"task must be one of .*'depth'"):
        list_models("depth")
    with pytest.raises(ValueError, match="hrnet_w48 is for task 'pose' only, got task='segmentation'"):
        create_model("hrnet_w48", task="segmentation")
    with pytest.raises(ValueError, match="align_corners=True is for bilinear upsampling only"):
        create_model("hrnet_w32", align_corners=True)
    with pytest.raises(ValueError, match=r"upsampling must be one of .*'bicubic'"):
        create_model("hrnet_w32", upsampling="bicubic")
    with pytest.raises(TypeError, match="multi_scale_output must be True or False"):
        create_model("hrnetv2_w32", multi_scale_output=1)
