"""Weight files: published layouts, built here by hand, load; ours survive the way through them."""

import builtins
import logging

import pytest
import torch
from torch import nn

from gsto_models import absorb_initial_gates, create_model, load_checkpoint, read_checkpoint, save_checkpoint

SMALL = "w18_small_v2"
EPS = 1e-5


def lifelike(model, negative=True):
    """Weights as training leaves them: every tensor its own, some scales negative."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            sign = torch.randn(module.weight.shape, generator=generator).sign() if negative else 1.0
            module.weight.data = sign * torch.empty(module.weight.shape).uniform_(0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.2, generator=generator)
            nn.init.normal_(module.running_mean, std=0.2, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator=generator)
            module.num_batches_tracked.fill_(7)
    return model.eval()


def build(name, **options):
    return create_model(name, num_classes=5, **options)


@pytest.fixture(scope="module")
def hrnet():
    return lifelike(build(f"hrnetv2_{SMALL}"))


@pytest.fixture(scope="module")
def gsto():
    return lifelike(build(f"gsto_hrnet_{SMALL}", gate_form="released"))


def on_meta(name, **options):
    """A network without memory: its names and shapes."""
    with torch.device("meta"):
        return create_model(name, **options)


def output(model):
    with torch.no_grad():
        return model.eval()(torch.linspace(-2, 2, 3 * 64 * 64).sin().view(1, 3, 64, 64))


def released_file(model):
    """What the authors' training code leaves: FullModel's prefix, in-place ABN (no counters), the unused att1, a loss."""
    tensors = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    tensors |= {"att1.1.0.0.weight": torch.zeros(1, 5, 3, 3), "att1.1.0.1.weight": torch.zeros(1)}
    return {"loss.criterion.weight": torch.ones(5), **{f"model.{name}": tensor for name, tensor in tensors.items()}}


def as_batch_norm(model):
    """The same network with every scale w replaced by |w| + 1e-5, module by module."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(module.weight.abs() + EPS)
    return model


def test_released_gsto_file(gsto):
    model = build(f"gsto_hrnet_{SMALL}", gate_form="released")
    report = load_checkpoint(model, released_file(gsto))
    expected = build(f"gsto_hrnet_{SMALL}", gate_form="released")
    expected.load_state_dict(gsto.state_dict())
    assert torch.equal(output(model), output(as_batch_norm(expected)))
    assert not torch.allclose(output(model), output(gsto), rtol=0.1)  # half of the signs were wrong otherwise
    assert report.backbone[0] == report.backbone[1] > 300
    assert not report.missing and not report.unexpected and not report.mismatched
    assert set(report.ignored) == {"att1: the released network never uses it", "outside of model.*, the network"}
    text = str(report)
    assert "looks like gsto_hrnet_w18_small_v2 gate_form='released'" in text
    assert "in-place ABN (every" in text and "without num_batches_tracked" in text and "att1" in text


def test_source_overrides_the_guess(hrnet):
    tensors = {name: t for name, t in hrnet.state_dict().items() if not name.endswith("num_batches_tracked")}
    model = build(f"hrnetv2_{SMALL}")
    assert "ABN" not in str(load_checkpoint(model, tensors, source="batch_norm"))
    assert torch.equal(output(model), output(hrnet))
    assert "source='inplace_abn'" in str(load_checkpoint(model, hrnet.state_dict(), "inplace_abn"))
    assert torch.equal(model.bn1.weight, hrnet.bn1.weight.abs() + EPS)
    with pytest.raises(ValueError, match=r"source must be one of .*inplace_abn.*got 'abn'"):
        load_checkpoint(model, tensors, source="abn")


def test_counters_tell_ordinary_batch_norm(hrnet):
    model = build(f"hrnetv2_{SMALL}")
    report = load_checkpoint(model, hrnet.state_dict())
    assert torch.equal(output(model), output(hrnet)) and "taken for ordinary BatchNorm" in str(report)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "network."])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_prefixes_and_wrappers(hrnet, prefix, wrapper):
    tensors = {f"{prefix}{name}": tensor for name, tensor in hrnet.state_dict().items()}
    model = build(f"hrnetv2_{SMALL}")
    report = load_checkpoint(model, {wrapper: tensors, "epoch": 3} if wrapper else tensors)
    assert len(report.matched) == len(tensors) and torch.equal(output(model), output(hrnet))


def imagenet_file(hrnet):
    tensors = {name: t for name, t in hrnet.state_dict().items() if not name.startswith("last_layer")}
    heads = [
        "incre_modules.0.0.conv1.weight",
        "downsamp_modules.0.0.weight",
        "final_layer.0.weight",
        "classifier.weight",
    ]
    return tensors | {name: torch.ones(8, 8, 1, 1) for name in heads}


def test_imagenet_classifier_file(hrnet):
    model = build(f"hrnetv2_{SMALL}")
    head = model.last_layer[3].weight.clone()
    file = {name: t for name, t in imagenet_file(hrnet).items() if not name.endswith("num_batches_tracked")}
    report = load_checkpoint(model, file)
    assert report.backbone[0] == report.backbone[1]
    assert all(name.startswith("last_layer.") for name in report.missing) and len(report.missing) == 8
    assert len(report.ignored["the head of an ImageNet classifier"]) == 4 and not report.unexpected
    assert torch.equal(model.bn1.weight, hrnet.bn1.weight)  # ordinary BatchNorm, even without counters
    assert torch.equal(model.last_layer[3].weight, head)
    assert "ImageNet" in report.looks_like


def test_openmmlab_file(hrnet):
    tensors = {f"backbone.{name}": t for name, t in hrnet.state_dict().items() if not name.startswith("last_layer")}
    file = {"state_dict": {**tensors, "decode_head.conv_seg.weight": torch.ones(5, 270, 1, 1)}, "meta": {"epoch": 1}}
    report = load_checkpoint(build(f"hrnetv2_{SMALL}"), file)
    assert report.backbone[0] == report.backbone[1]
    assert report.ignored == {"outside of backbone.*, the network": ["decode_head.conv_seg.weight"]}


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_torchvision_file(prefix):
    """ResNet-50 into a network that has it as a part; ordinary BatchNorm, though old files have no counters."""
    model = create_model("pspnet_r50", num_classes=5)
    names = [name for name in model.state_dict() if name.startswith("backbone.") and "num_batches" not in name]
    tensors = {name.removeprefix("backbone."): torch.rand_like(model.state_dict()[name]) - 0.5 for name in names}
    classifier = {"fc.weight": torch.ones(9, 2048), "fc.bias": torch.ones(9)}
    report = load_checkpoint(model, {f"{prefix}{name}": tensor for name, tensor in {**tensors, **classifier}.items()})
    assert report.backbone == (len(names), len(names)) == (265, 265)
    assert all(torch.equal(model.state_dict()[f"backbone.{name}"], tensor) for name, tensor in tensors.items())
    assert report.looks_like.startswith("ResNet-50") and not report.unexpected
    assert len(report.ignored["the head of an ImageNet classifier"]) == 2
    assert all(name.startswith("head.") for name in report.missing) and report.missing


def test_number_of_classes_may_differ(hrnet):
    model = create_model(f"hrnetv2_{SMALL}", num_classes=3)
    report = load_checkpoint(model, hrnet.state_dict())
    assert report.mismatched == {
        "last_layer.3.weight": ((5, 270, 1, 1), (3, 270, 1, 1)),
        "last_layer.3.bias": ((5,), (3,)),
    }
    assert "(5, 270, 1, 1) instead of (3, 270, 1, 1)" in str(report)


@pytest.mark.parametrize("layout", ["native", "released"])
@pytest.mark.parametrize("which", ["hrnet", "gsto"])
def test_round_trip_is_bit_equal(request, tmp_path, layout, which):
    model = request.getfixturevalue(which)
    path = save_checkpoint(model, tmp_path / "new" / "file.pth", layout)
    options = {"gate_form": "released"} if which == "gsto" else {}
    again = build(f"{'gsto_hrnet' if which == 'gsto' else 'hrnetv2'}_{SMALL}", **options)
    report = load_checkpoint(again, path)
    assert not report.missing and not report.unexpected
    assert torch.equal(output(again), output(model))


def test_released_layout_is_in_place_abn(gsto, tmp_path):
    file = torch.load(save_checkpoint(gsto, tmp_path / "file.pth", "released"), weights_only=True)
    assert all(name.startswith("model.") and "num_batches_tracked" not in name for name in file)
    scale = file["model.bn1.weight"]
    assert (scale > 0).all() and torch.equal(scale + EPS, gsto.bn1.weight.abs())


def test_every_scale_has_an_abn_weight(tmp_path):
    model = lifelike(build(f"hrnetv2_{SMALL}"))
    scales = 10 ** torch.empty(64).uniform_(-3.9, 2)
    scales[:3] = torch.tensor([1.01e-5, 3e-5, 6e-5])
    with torch.no_grad():
        for norm in (model.bn1, model.bn2, model.layer1[0].bn1):
            norm.weight.copy_(scales)
    again = build(f"hrnetv2_{SMALL}")
    load_checkpoint(again, save_checkpoint(model, tmp_path / "file.pth", "released"))
    assert torch.equal(again.bn2.weight, scales)


def test_what_the_released_layout_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="gate_form='released'"):
        save_checkpoint(build(f"gsto_hrnet_{SMALL}"), tmp_path / "file.pth", "released")
    model = build(f"hrnetv2_{SMALL}")
    with pytest.raises(ValueError, match=r"no place for last_layer\.0\.level_mean"):
        save_checkpoint(on_meta(f"hrnetv2_{SMALL}", scale_equalizer=True), tmp_path / "file.pth", "released")
    with pytest.raises(ValueError, match="layout='released' is for HRNet and GSTO-HRNet, this is ResNet-50"):
        save_checkpoint(on_meta("rsp_r50"), tmp_path / "file.pth", "released")
    nn.init.zeros_(model.bn2.weight)
    with pytest.raises(ValueError, match=r"cannot hold bn2\.weight: .*layout='native'"):
        save_checkpoint(model, tmp_path / "file.pth", "released")
    with pytest.raises(ValueError, match=r"layout must be one of .*'relesed'"):
        save_checkpoint(model, tmp_path / "file.pth", "relesed")
    with pytest.raises(ValueError, match="unknown network"):
        save_checkpoint(nn.Linear(2, 2), tmp_path / "file.pth", "released")
    assert not list(tmp_path.iterdir())


def test_gate_form_must_be_the_file_s(gsto):
    with pytest.raises(ValueError, match=r"gate_form='paper': create the model with gate_form='released'"):
        load_checkpoint(build(f"gsto_hrnet_{SMALL}"), released_file(gsto))
    paper = build(f"gsto_hrnet_{SMALL}").state_dict()
    with pytest.raises(ValueError, match="create the model with gate_form='paper'"):
        load_checkpoint(build(f"gsto_hrnet_{SMALL}", gate_form="released"), paper)
    with pytest.raises(ValueError, match="create the model with gate_bias_init=None"):
        load_checkpoint(build(f"gsto_hrnet_{SMALL}", gate_bias_init=4.0), paper)
    with pytest.raises(ValueError, match="model is hrnetv2_w18_small_v2 with other gates"):
        load_checkpoint(build(f"hrnetv2_{SMALL}"), paper)
    for other in ({"gated_transition": (3,)}, {"transition_form": "paper"}, {"gate_kind": "channel"}):
        with pytest.raises(ValueError, match="options gated_fusion, gated_transition, transition_form"):
            load_checkpoint(build(f"gsto_hrnet_{SMALL}", **other), paper)
    with pytest.raises(ValueError, match="gate on ResNet-50"):
        load_checkpoint(on_meta("pspnet_r50"), on_meta("pspnet_r50", gate="unsupervised").state_dict())
    report = load_checkpoint(build(f"hrnetv2_{SMALL}"), paper, min_matched=0)
    assert report.unexpected and not report.missing


def test_pretrained_takes_form_and_classes_from_the_file(gsto, tmp_path, caplog):
    path = save_checkpoint(gsto, tmp_path / "file.pth", "released")
    with caplog.at_level(logging.INFO, logger="gsto_models"):
        model = create_model(f"gsto_hrnet_{SMALL}", pretrained=path)
    assert torch.equal(output(model), output(gsto))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and "gate_form='released'" in said[0] and "num_classes=5" in said[0]
    with pytest.raises(ValueError, match="create the model with gate_form='released'"):
        create_model(f"gsto_hrnet_{SMALL}", pretrained=path, gate_form="paper")


def test_pretrained_with_a_gate_bias(tmp_path):
    model = lifelike(build(f"gsto_hrnet_{SMALL}", gate_bias_init=4.0))
    again = create_model(f"gsto_hrnet_{SMALL}", pretrained=save_checkpoint(model, tmp_path / "file.pth"))
    assert torch.equal(output(again), output(model))


def test_gates_that_start_open_are_absorbed(hrnet):
    model = build(f"gsto_hrnet_{SMALL}", gate_bias_init=4.0)
    report = load_checkpoint(model, hrnet.state_dict())
    assert "absorbed" in str(report)
    by_hand = build(f"gsto_hrnet_{SMALL}", gate_bias_init=4.0)
    by_hand.load_state_dict(hrnet.state_dict(), strict=False)
    left = build(f"gsto_hrnet_{SMALL}", gate_bias_init=4.0)
    assert "would keep" in str(load_checkpoint(left, hrnet.state_dict(), absorb_gates=False))
    weight = "stage4.1.branches.0.0.conv1.weight"
    assert torch.equal(left.state_dict()[weight], by_hand.state_dict()[weight])
    absorb_initial_gates(by_hand)
    assert torch.equal(model.state_dict()[weight], by_hand.state_dict()[weight])
    assert "fresh" in str(load_checkpoint(build(f"gsto_hrnet_{SMALL}"), hrnet.state_dict()))


def test_wrong_family_is_named_and_nothing_changes(hrnet):
    model = build("hrnetv2_w18")
    before = model.state_dict()["stage2.0.branches.0.0.conv1.weight"].clone()
    with pytest.raises(ValueError, match=r"looks like hrnetv2_w18_small_v2, but the model is hrnetv2_w18: \d+ of"):
        load_checkpoint(model, hrnet.state_dict())
    assert torch.equal(model.state_dict()["stage2.0.branches.0.0.conv1.weight"], before)
    assert load_checkpoint(model, hrnet.state_dict(), min_matched=0.3).backbone[0] > 300
    with pytest.raises(ValueError, match="looks like ResNet-50, but the model is hrnetv2_w18"):
        load_checkpoint(model, on_meta("rsp_r50").state_dict())
    with pytest.raises(ValueError, match="looks like gsto_hrnet_w18 gate_form='paper', but the model is ResNet-50"):
        load_checkpoint(on_meta("pspnet_r50"), on_meta("gsto_hrnet_w18").state_dict())
    with pytest.raises(ValueError, match=r"an unknown network \(tensors encoder"):
        load_checkpoint(model, {"encoder.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"min_matched must be from 0 to 1, got 95"):
        load_checkpoint(model, hrnet.state_dict(), min_matched=95)


def test_files_that_cannot_be_read(tmp_path):
    model = build(f"hrnetv2_{SMALL}")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file"):
        load_checkpoint(model, tmp_path / "nowhere.pth")
    junk = tmp_path / "junk.pth"
    for contents in (
        b"",
        b"not weights",
        b"root:x:0:0:root:/root:/bin/bash\n",
        b"\x89PNG\r\n",
        b"PK\x03\x04",
        bytes(range(256)),
    ):
        junk.write_bytes(contents)
        with pytest.raises(ValueError, match=r"junk\.pth: not a file of tensors"):
            load_checkpoint(model, junk)
    torch.save({"model": model}, junk)  # a pickled network would run code when it is loaded
    with pytest.raises(ValueError, match="weights_only=True"):
        load_checkpoint(model, junk)
    torch.save({"epoch": 3}, junk)
    with pytest.raises(ValueError, match=r"junk\.pth: the checkpoint holds no tensors; its keys are epoch"):
        load_checkpoint(model, junk)
    torch.save([1], junk)
    with pytest.raises(ValueError, match="must be a dictionary of tensors, got list"):
        load_checkpoint(model, junk)


def test_safetensors(hrnet, tmp_path):
    pytest.importorskip("safetensors", reason="the package safetensors is not installed")
    path = save_checkpoint(hrnet, tmp_path / "file.safetensors")
    model = build(f"hrnetv2_{SMALL}")
    load_checkpoint(model, path)
    assert torch.equal(output(model), output(hrnet))
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a file of tensors"):
        load_checkpoint(model, path)


def test_safetensors_is_optional(hrnet, tmp_path, monkeypatch):
    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        save_checkpoint(hrnet, tmp_path / "file.safetensors")


def test_pose_file_has_ordinary_batch_norm(tmp_path):
    model = create_model(f"hrnetv2_{SMALL}", task="pose")
    nn.init.normal_(model.bn1.weight)
    file = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    contents = read_checkpoint(file)
    assert contents.source == "batch_norm" and contents.num_classes == 17
    path = save_checkpoint(model, tmp_path / "file.pth", "released")
    again = create_model(f"hrnetv2_{SMALL}", pretrained=path)
    assert again.head_name == "final_layer"
    other = create_model(f"hrnetv2_{SMALL}", task="segmentation", pretrained=path)
    assert other.last_layer[3].out_channels == 19
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("hrnet_w32", "pose", "hrnet_w32 pose"),
        ("gsto_hrnet_w48", "pose", "gsto_hrnet_w48 gate_form='paper' pose"),
        ("hrnetv2_w18", "segmentation", "hrnetv2_w18"),
    ],
)
def test_networks_are_known_by_their_tensors(name, task, words):
    contents = read_checkpoint(on_meta(name, task=task).state_dict())
    assert contents.looks_like == words and contents.num_classes == {"pose": 17, "segmentation": 19}[task]


def test_timm_weights_make_timm_s_features():
    """An ImageNet HRNet upsamples by nearest; everything else of the trunk is HRNetV2's."""
    timm = pytest.importorskip("timm", reason="the package timm cannot be imported", exc_type=Exception)
    theirs = lifelike(timm.create_model(f"hrnet_{SMALL}", pretrained=False))
    ours, branches = build(f"hrnetv2_{SMALL}", upsampling="nearest").eval(), []
    report = load_checkpoint(ours, theirs.state_dict())
    assert report.backbone[0] == report.backbone[1] and not report.unexpected
    ours.stage4.register_forward_hook(lambda module, args, output: branches.extend(output))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours(image)
        stem = theirs.act2(theirs.bn2(theirs.conv2(theirs.act1(theirs.bn1(theirs.conv1(image))))))
        for found, expected in zip(branches, theirs.stages(stem), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
